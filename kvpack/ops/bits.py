"""Exact packing of small codes into bytes.

A row of N codes becomes a little-endian bit stream: code j occupies the bits [j*b, (j+1)*b), bit i
of the stream is bit i % 8 of byte i // 8, and the last byte is padded with zeros. Three-bit codes
therefore cost three bits, not four.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    codes = torch.unflatten(_pad(codes, codes_per_word), -1, (-(-count // codes_per_word), codes_per_word))
    word = codes[..., 0].to(word_dtype)
    for j in range(1, codes_per_word):
        word = word | (codes[..., j].to(word_dtype) << (bits * j))
    if word_bytes == 1:
        return word
    stream = torch.stack([(word >> (8 * k) & 255).to(torch.uint8) for k in range(word_bytes)], -1)
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
    words = -(-packed.shape[-1] // word_bytes)
    parts = torch.unflatten(_pad(packed, word_bytes), -1, (words, word_bytes))
    word = parts[..., 0].to(word_dtype)
    for k in range(1, word_bytes):
        word = word | (parts[..., k].to(word_dtype) << (8 * k))
    codes = torch.empty((*word.shape, codes_per_word), dtype=torch.uint8, device=packed.device)
    for j in range(codes_per_word):
        codes[..., j] = (word >> (bits * j)) & (2**bits - 1)
    return codes.flatten(-2)[..., :count].contiguous()


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
    """The smallest run of whole codes that fills whole bytes: its codes, bytes, and a dtype for it."""
    if 8 % bits == 0:
        return 8 // bits, 1, torch.uint8
    return 8, bits, torch.int64


def _pad(x: Tensor, multiple: int) -> Tensor:
    missing = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _check(x: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    if x.dtype != torch.uint8:
        raise ValueError(f"codes and packed codes are uint8, not {x.dtype}")
