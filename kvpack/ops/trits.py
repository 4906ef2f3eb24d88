"""Exact packing of ternary codes, five to a byte.

3^5 = 243 of a byte's 256 values are used: 1.6 bits per code, where the entropy bound is
log2 3 = 1.585. Byte j of a row holds the codes 5j to 5j + 4 as digits of base 3, the first one
least; missing digits of the last byte are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_BYTE = 5
_POWERS = (1, 3, 9, 27, 81)


def packed_size(codes: int) -> int:
    """Bytes of a packed row of `codes` codes."""
    return -(-codes // PER_BYTE)


def pack(codes: Tensor) -> Tensor:
    """Pack `codes`, uint8 [..., N] of 0, 1 and 2, into uint8 [..., ceil(N/5)].

    Raises:
        ValueError: `codes` is not uint8.
    """
    _check(codes)
    missing = -codes.shape[-1] % PER_BYTE
    digits = torch.nn.functional.pad(codes, (0, missing))
    digits = torch.unflatten(digits, -1, (digits.shape[-1] // PER_BYTE, PER_BYTE))
    return (digits * digits.new_tensor(_POWERS)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """Invert `pack` for rows of `count` codes.

    Raises:
        ValueError: `packed` is not uint8, or its rows do not hold exactly `count` codes.
    """
    _check(packed)
    if packed.shape[-1] != packed_size(count):
        raise ValueError(f"{count} ternary codes fill {packed_size(count)} bytes, got {packed.shape[-1]}")
    digits = packed.unsqueeze(-1) // packed.new_tensor(_POWERS) % 3
    return digits.flatten(-2)[..., :count].contiguous()


def _check(x: Tensor) -> None:
    if x.dtype != torch.uint8:
        raise ValueError(f"codes and packed codes are uint8, not {x.dtype}")
