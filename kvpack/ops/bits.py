"""Exact packing of small codes into bytes.

A row of N codes becomes a little-endian bit stream: code j occupies the bits [j*b, (j+1)*b), bit i
of the stream is bit i % 8 of byte i // 8, and the last byte is padded with zeros. Three-bit codes
therefore cost three bits, not four.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""A dtype that holds so many codes, one in each byte."""


def packed_size(codes: int, bits: int) -> int:
    """Bytes of a packed row of `codes` codes."""
    return (codes * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` along the last axis.

    Args:
        codes: uint8 [..., N], every code below ``2**bits``.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 [..., ceil(N*bits/8)].

    Raises:
        ValueError: `bits` is out of range or `codes` is not uint8.
    """
    _check(codes, bits)
    if bits == 8:
        return codes
    count = codes.shape[-1]
    codes_per_word, word_bytes, word_dtype = _word(bits)
    word = _as_words(_pad(codes, codes_per_word), word_dtype)
    if word_bytes == 1:
        for span in _spans(codes_per_word):
            word = (word >> span * (8 - bits)).bitwise_or_(word)
        return word.to(torch.uint8)  # cuts off what stands above
    word = _gather(word, bits, codes_per_word)
    stream = torch.unflatten(word.view(torch.uint8), -1, (-1, codes_per_word))[..., :word_bytes]
    return stream.flatten(-2)[..., : packed_size(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack`.

    Args:
        packed: uint8 [..., ceil(count*bits/8)].
        bits: width of a code, 1 to 8.
        count: N, the number of codes per row.

    Returns:
        uint8 [..., count].

    Raises:
        ValueError: `bits` is out of range, or the rows do not hold exactly `count` codes.
    """
    _check(packed, bits)
    if packed.shape[-1] != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits fill {packed_size(count, bits)} bytes, got {packed.shape[-1]}"
        )
    if bits == 8:
        return packed
    codes_per_word, word_bytes, word_dtype = _word(bits)
    if word_bytes == 1:
        word = packed.to(word_dtype)
    else:
        words = -(-packed.shape[-1] // word_bytes)
        parts = torch.unflatten(_pad(packed, word_bytes), -1, (words, word_bytes))
        word = torch.nn.functional.pad(parts, (0, codes_per_word - word_bytes)).view(word_dtype)[..., 0]
    return _scatter(word, bits, codes_per_word).view(torch.uint8)[..., :count].contiguous()


def pack_wide(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of up to 16 bits along the last axis, in as many bytes as `pack` would take.

    Codes of more than 8 bits are two streams one after the other: the low bytes of all codes of the
    row, then their other bits as `pack` lays them out.

    Args:
        codes: integers [..., N], every code below ``2**bits``.
        bits: width of a code, 1 to 16.

    Returns:
        uint8 [..., ceil(N*bits/8)].

    Raises:
        ValueError: `bits` is out of range.
    """
    if bits <= 8:
        return pack(codes.to(torch.uint8), bits)
    low, high = codes & 255, codes >> 8
    return torch.cat((low.to(torch.uint8), pack(high.to(torch.uint8), bits - 8)), -1)


def unpack_wide(packed: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack_wide`: int64 [..., count].

    Raises:
        ValueError: `bits` is out of range, or the rows do not hold exactly `count` codes.
    """
    if bits <= 8:
        return unpack(packed, bits, count).long()
    high = unpack(packed[..., count:], bits - 8, count).long()
    return packed[..., :count].long() | high << 8


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """The smallest run of whole codes that fills whole bytes: its codes, bytes packed, dtype unpacked."""
    codes = 8 // math.gcd(8, bits)
    return codes, codes * bits // 8, _INTEGERS[codes]


def _as_words(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Neighbouring bytes as one little-endian integer."""
    flat = codes.flatten()  # one row may have any stride, and viewing it as words would fail
    flat = (flat.clone() if flat.storage_offset() % dtype.itemsize else flat).view(dtype)
    return flat.view(*codes.shape[:-1], codes.shape[-1] // dtype.itemsize)


def _gather(word: Tensor, bits: int, codes: int) -> Tensor:
    """Move the low `bits` bits of every byte of a word together: pairs first, then pairs of pairs."""
    for span in _spans(codes):
        upper = word & _mask(8 * span, span * bits, span, codes)
        word = (word ^ upper).bitwise_or_(upper.bitwise_right_shift_(span * (8 - bits)))
    return word


def _scatter(word: Tensor, bits: int, codes: int) -> Tensor:
    """Invert `_gather`."""
    for span in reversed(_spans(codes)):
        upper = word & _mask(span * bits, span * bits, span, codes)
        word = (word ^ upper).bitwise_or_(upper.bitwise_left_shift_(span * (8 - bits)))
    return word


def _spans(codes: int) -> list[int]:
    """1, 2, 4, ... below `codes`: neighbouring runs of so many codes are joined."""
    return [1 << step for step in range(codes.bit_length() - 1)]


def _mask(first: int, width: int, span: int, codes: int) -> int:
    """`width` ones from bit `first` of every `2 * span` bytes of a word."""
    return sum(((1 << width) - 1) << (first + start) for start in range(0, 8 * codes, 16 * span))


def _pad(x: Tensor, multiple: int) -> Tensor:
    missing = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _check(x: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    if x.dtype != torch.uint8:
        raise ValueError(f"codes and packed codes are uint8, not {x.dtype}")
