"""Vector code that reads numbers as they are stored: floats of 32, 16 and 8 bits."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kvpack.kernels.cpu import jit
from kvpack.kernels.cpu.codes import LANES, load
from kvpack.kernels.cpu.jit import F16, F32, I8, I16, I32
from kvpack.kernels.cpu.vectors import every

FLOAT8_WIDE = 5
"""How a number is stored, beside the kinds of `jit`: float8_e5m2."""

SIZES = {jit.FLOAT32: 4, jit.FLOAT16: 2, jit.BFLOAT16: 2, jit.FLOAT8: 1, FLOAT8_WIDE: 1}
"""Bytes of a number, by how it is stored."""

BYTES, HALVES, WORDS = (ir.VectorType(kind, LANES) for kind in (I8, I16, I32))


def widened(builder: Any, kind: int, address: Any, count: int = LANES) -> Any:
    """The `count` numbers stored at an address as float32."""
    bytes_, halves, words = (ir.VectorType(width, count) for width in (I8, I16, I32))
    floats = ir.VectorType(F32, count)
    if kind == jit.FLOAT32:
        return load(builder, address, floats)
    if kind == jit.FLOAT16:
        return builder.fpext(load(builder, address, ir.VectorType(F16, count)), floats)
    if kind == jit.BFLOAT16:
        wide = builder.zext(load(builder, address, halves), words)
        return builder.bitcast(builder.shl(wide, every(words, 16)), floats)
    if kind == FLOAT8_WIDE:  # The upper half of a float16.
        wide = builder.shl(builder.zext(load(builder, address, bytes_), halves), every(halves, 8))
        return builder.fpext(builder.bitcast(wide, ir.VectorType(F16, count)), floats)
    wide = builder.zext(load(builder, address, bytes_), words)
    low = builder.and_(wide, every(words, 0x7F))
    # As in `jit`: shift into place, then scale by 2^120.
    size = builder.fmul(builder.bitcast(builder.shl(low, every(words, 20)), floats), every(floats, 2.0**120))
    size = builder.select(
        builder.icmp_unsigned("==", low, every(words, 0x7F)), every(floats, float("nan")), size
    )
    sign = builder.shl(builder.and_(wide, every(words, 0x80)), every(words, 24))
    return builder.bitcast(builder.or_(builder.bitcast(size, words), sign), floats)
