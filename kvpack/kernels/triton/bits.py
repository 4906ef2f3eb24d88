"""Codes out of packed rows, inside a kernel.

A row is read in *units*: the least run of whole codes that fills whole bytes (`kvpack.ops.bits`):
4 codes in a byte at 2 bits, 8 in 3 bytes at 3 bits, 2 in a byte at 4 bits. Code j of every unit
makes *plane* j, channels j, j + n, j + 2n, ... A sum over channels is a sum over planes, so codes
are never brought back into channel order: each plane is multiplied with the channels it holds, and
a thread unpacks just the bytes that it feeds to the matrix unit.

Codes become numbers without an integer conversion, which GPUs do at a quarter of the speed: bits
put into the mantissa of 2^m give 2^m + code exactly, and one multiply-add subtracts the rest.
Everything here is exact; results are centred, code - 2^(bits-1), so that sums cancel less.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpack.kernels.triton import interpreting

ZERO_NONE, ZERO_FLOAT, ZERO_INTEGER = 0, 1, 2
NO_ZERO = tl.constexpr(ZERO_NONE)
FLOAT_ZERO = tl.constexpr(ZERO_FLOAT)


def unit(bits: int) -> tuple[int, int]:
    """Codes and bytes of one unit.

    Raises:
        ValueError: `bits` is not 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    return 8 // math.gcd(8, bits), bits // math.gcd(8, bits)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """In what inputs of `dtype` are multiplied: themselves.

    Triton's interpreter multiplies bfloat16 as if it were integers, so float32 stands in for it.
    """
    if dtype == torch.bfloat16:
        return tl.float32 if interpreting() else tl.bfloat16
    return {torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def zero_kind(zero: Tensor | None) -> int:
    """Which grid of `kvpack.ops.affine` a zero tensor belongs to."""
    if zero is None:
        return ZERO_NONE
    return ZERO_FLOAT if zero.dtype.is_floating_point else ZERO_INTEGER


@triton.jit
def load_units(rows, first, mask, D: tl.constexpr, U: tl.constexpr, BITS: tl.constexpr):
    """Units of rows of D codes, as integers.

    `rows` points to rows, `first` is the first byte within them of each of U units, or of some of
    them (U = 0). Bytes past the end of a row read as zeros.
    """
    BYTES: tl.constexpr = BITS if BITS % 2 == 1 else (BITS // 2 if BITS % 4 == 2 else 1)
    ROW: tl.constexpr = (D * BITS + 7) // 8
    WORD: tl.constexpr = tl.int32 if BYTES <= 3 else tl.int64
    if U * BYTES > ROW or U == 0:
        mask = mask & (first < ROW)
    word = tl.load(rows + first, mask=mask, other=0).to(WORD)
    for k in tl.static_range(1, BYTES):
        ok = mask
        if U * BYTES > ROW or U == 0:
            ok = mask & (first + k < ROW)
        word = word | (tl.load(rows + first + k, mask=ok, other=0).to(WORD) << (8 * k))
    return word


@triton.jit
def split_planes(x, N: tl.constexpr):
    """Numbers [A, U*N] in channel order as N planes [A, U]."""
    A: tl.constexpr = x.shape[0]
    U: tl.constexpr = x.shape[1] // N
    if N == 1:
        planes = (x,)
    elif N == 2:
        planes = tl.split(tl.reshape(x, [A, U, 2]))
    elif N == 4:
        even, odd = tl.split(tl.reshape(x, [A, U, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        planes = (a, b, c, d)
    else:
        even, odd = tl.split(tl.reshape(x, [A, U, 2, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        a, e = tl.split(first)
        b, f = tl.split(second)
        c, g = tl.split(third)
        d, h = tl.split(fourth)
        planes = (a, b, c, d, e, f, g, h)
    return planes


@triton.jit
def plane(word, J: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Code J of every unit, less 2^(BITS-1), in DTYPE (float16, bfloat16 or float32)."""
    SHIFT: tl.constexpr = J * BITS
    ONES: tl.constexpr = (1 << BITS) - 1
    # 0x6400 is 1024, whose mantissa of 10 bits counts ones; 0x4B000000 is 2^23. Two float32 become
    # a pair of bfloat16 in one instruction, and Triton's interpreter knows no arithmetic in bfloat16.
    NARROW: tl.constexpr = DTYPE == tl.float16
    MANTISSA: tl.constexpr = 10 if NARROW else 23
    IN_PLACE: tl.constexpr = SHIFT + BITS <= MANTISSA
    UNITY: tl.constexpr = 0.5**SHIFT if IN_PLACE else 1.0
    REST: tl.constexpr = (1 << MANTISSA) * UNITY + (1 << (BITS - 1))
    code = word & (ONES << SHIFT) if IN_PLACE else (word >> SHIFT) & ONES
    if NARROW:
        number = (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    else:
        number = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return (number * UNITY - REST).to(DTYPE)


@triton.jit
def load_grid(scale, zero, offsets, mask, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Step and offset of x = (code - 2^(BITS-1)) * step + offset, float32."""
    step = tl.load(scale + offsets, mask=mask, other=0.0).to(tl.float32)
    if ZERO == NO_ZERO:
        offset = tl.zeros_like(step)
    elif ZERO == FLOAT_ZERO:
        offset = tl.load(zero + offsets, mask=mask, other=0.0).to(tl.float32) + step * (1 << (BITS - 1))
    else:
        offset = tl.load(zero + offsets, mask=mask, other=0).to(tl.float32) * -step
    return step, offset
