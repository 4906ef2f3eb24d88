"""What compiled loops are made of: numbers at addresses, small floats, counters.

Compiled functions know addresses and integers only, no arrays: numba would compile dozens of helpers
for those, and a user waits for each of them once. What a loop does is decided at run time wherever
a branch per row costs nothing.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu.frames import BFLOAT16 as BFLOAT16
from kvpack.kernels.cpu.frames import FLOAT8 as FLOAT8
from kvpack.kernels.cpu.frames import FLOAT16 as FLOAT16
from kvpack.kernels.cpu.frames import FLOAT32 as FLOAT32
from kvpack.kernels.cpu.frames import INT8 as INT8
from kvpack.kernels.cpu.objects import SUPPORTED
from kvpack.kernels.cpu.objects import stamp as stamp

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

ADDRESS = types.int64
ENTRY = types.void(types.voidptr)
"""Signature of what the pool runs."""
KEPT_BY_NUMBA = not SUPPORTED
"""Whether numba keeps compiled loops. A loop must then hold `stamp` as a constant: its cache notices changes
in one file only."""

device = numba.njit(nogil=True, error_model="numpy")
"""Decorator of functions that compiled functions call.

Without fast mathematics: decoded numbers equal those of `kvpack.ops` bit for bit. Sums are reordered
where the vector code says so."""


def _place(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _reader(kind: Any, result: Any, convert: Any = None) -> Any:
    """An intrinsic that reads a number of an LLVM type at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(_place(builder, arguments[0], kind))
        value.align = 1
        return value if convert is None else convert(builder, value)

    def typed(typing: Any, address: Any) -> Any:
        return result(ADDRESS), generate

    return intrinsic(typed)


def _writer(kind: Any, given: Any, convert: Any = None) -> Any:
    """An intrinsic that writes a number to an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[1] if convert is None else convert(builder, arguments[1])
        builder.store(value, _place(builder, arguments[0], kind)).align = 1
        return context.get_dummy_value()

    def typed(typing: Any, address: Any, number: Any) -> Any:
        return types.void(ADDRESS, given), generate

    return intrinsic(typed)


read_integer = _reader(I64, types.int64)
read_byte = _reader(I8, types.int64, lambda b, v: b.zext(v, I64))
read_word = _reader(I16, types.int64, lambda b, v: b.zext(v, I64))
read_float = _reader(F32, types.float32)
read_half = _reader(F16, types.float32, lambda b, v: b.fpext(v, F32))
read_bfloat = _reader(I16, types.float32, lambda b, v: b.bitcast(b.shl(b.zext(v, I32), I32(16)), F32))
read_int8 = _reader(I8, types.float32, lambda b, v: b.sitofp(v, F32))
write_byte = _writer(I8, types.int64, lambda b, v: b.trunc(v, I8))
write_word = _writer(I16, types.int64, lambda b, v: b.trunc(v, I16))
write_float = _writer(F32, types.float32)
write_half = _writer(I16, types.float32, lambda b, v: b.bitcast(b.fptrunc(v, F16), I16))


@intrinsic
def widen_eight_halves(typing: Any, address: Any, out: Any) -> Any:
    """Write eight float16 numbers as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, out = arguments
        halves = builder.load(_place(builder, address, ir.VectorType(F16, 8)))
        halves.align = 2
        wide = ir.VectorType(F32, 8)
        builder.store(builder.fpext(halves, wide), _place(builder, out, wide)).align = 4
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS), generate


def _rounded(builder: Any, number: Any) -> Any:
    """The bfloat16 bits of a float32 number: rounded to nearest even, NaN stays NaN."""
    word = builder.bitcast(number, I32)
    odd = builder.and_(builder.lshr(word, I32(16)), I32(1))
    up = builder.lshr(builder.add(builder.add(word, I32(0x7FFF)), odd), I32(16))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", number, number), I32(0x7FC0), up), I16)


write_bfloat = _writer(I16, types.float32, _rounded)


def _from_float8(builder: Any, word: Any) -> Any:
    """The number whose float8_e4m3fn bits are `word`."""
    wide = builder.zext(word, I32)
    low = builder.and_(wide, I32(0x7F))
    # A float8 has four exponent bits about 7, a float32 eight about 127: shift, then scale by 2^120.
    size = builder.fmul(builder.bitcast(builder.shl(low, I32(20)), F32), F32(2.0**120))
    size = builder.select(builder.icmp_unsigned("==", low, I32(0x7F)), F32(float("nan")), size)
    sign = builder.shl(builder.and_(wide, I32(0x80)), I32(24))
    return builder.bitcast(builder.or_(builder.bitcast(size, I32), sign), F32)


read_float8 = _reader(I8, types.float32, _from_float8)


@intrinsic
def add_to(typing: Any, address: Any, amount: Any) -> Any:
    """Add to the integer at an address, alone among threads; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, arguments[0], I64), arguments[1], "monotonic")

    return types.int64(ADDRESS, types.int64), generate


@intrinsic
def address_of(typing: Any, pointer: Any) -> Any:
    """A pointer as an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], I64)

    return types.int64(types.voidptr), generate


@intrinsic
def at(typing: Any, frame: Any, index: Any) -> Any:
    """A number of a frame."""

    # No function of its own: numba would compile one for every index that is a constant.
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        frame, index = arguments
        return builder.load(_place(builder, builder.add(frame, builder.mul(index, I64(8))), I64))

    return types.int64(ADDRESS, types.int64), generate


@device
def read(address: Any, kind: Any, index: Any) -> Any:
    """One of the numbers of a kind that are stored at an address."""
    if kind == FLOAT32:
        return read_float(address + 4 * index)
    if kind == FLOAT16:
        return read_half(address + 2 * index)
    if kind == BFLOAT16:
        return read_bfloat(address + 2 * index)
    if kind == FLOAT8:
        return read_float8(address + index)
    return read_int8(address + index)


@device
def write(address: Any, kind: Any, index: Any, number: Any) -> Any:
    """Store a float32 number among numbers of a kind (float32, float16, bfloat16)."""
    if kind == FLOAT32:
        write_float(address + 4 * index, number)
    elif kind == FLOAT16:
        write_half(address + 2 * index, number)
    else:
        write_bfloat(address + 2 * index, number)


@device
def widen(address: Any, kind: Any, count: Any, out: Any) -> Any:
    """Write `count` stored numbers as float32 to `out`."""
    if kind == FLOAT32:
        for i in range(count):
            write_float(out + 4 * i, read_float(address + 4 * i))
    elif kind == FLOAT16:
        whole = count // 8 * 8  # LLVM makes no vectors of halves by itself
        for i in range(0, whole, 8):
            widen_eight_halves(address + 2 * i, out + 4 * i)
        for i in range(whole, count):
            write_float(out + 4 * i, read_half(address + 2 * i))
    elif kind == BFLOAT16:
        for i in range(count):
            write_float(out + 4 * i, read_bfloat(address + 2 * i))
    else:
        for i in range(count):
            write_float(out + 4 * i, read(address, kind, i))


@device
def narrow(numbers: Any, count: Any, out: Any, kind: Any) -> Any:
    """Write `count` float32 numbers to `out` as numbers of a kind (float32, float16, bfloat16)."""
    if kind == FLOAT32:
        for i in range(count):
            write_float(out + 4 * i, read_float(numbers + 4 * i))
    elif kind == FLOAT16:
        for i in range(count):
            write_half(out + 2 * i, read_float(numbers + 4 * i))
    else:
        for i in range(count):
            write_bfloat(out + 2 * i, read_float(numbers + 4 * i))


@device
def fill(out: Any, count: Any, number: Any) -> Any:
    """Write `count` times the same float32 number."""
    for i in range(count):
        write_float(out + 4 * i, np.float32(number))
