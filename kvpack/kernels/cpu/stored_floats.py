"""Vector code that reads sixteen numbers as they are stored: floats of 32, 16 and 8 bits."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kvpack.kernels.cpu import jit
from kvpack.kernels.cpu.codes import LANES, load
from kvpack.kernels.cpu.jit import F16, I8, I16, I32
from kvpack.kernels.cpu.vectors import FLOATS, every

FLOAT8_WIDE = 5
"""How a number is stored, beside the kinds of `jit`: float8_e5m2."""

SIZES = {jit.FLOAT32: 4, jit.FLOAT16: 2, jit.BFLOAT16: 2, jit.FLOAT8: 1, FLOAT8_WIDE: 1}
"""Bytes of a number, by how it is stored."""

BYTES, HALVES, WORDS = (ir.VectorType(kind, LANES) for kind in (I8, I16, I32))


def widened(builder: Any, kind: int, address: Any) -> Any:
    """Sixteen stored numbers as float32."""
    if kind == jit.FLOAT32:
        return load(builder, address, FLOATS)
    if kind == jit.FLOAT16:
        return builder.fpext(load(builder, address, ir.VectorType(F16, LANES)), FLOATS)
    if kind == jit.BFLOAT16:
        wide = builder.zext(load(builder, address, HALVES), WORDS)
        return builder.bitcast(builder.shl(wide, every(WORDS, 16)), FLOATS)
    if kind == FLOAT8_WIDE:  # The upper half of a float16.
        wide = builder.shl(builder.zext(load(builder, address, BYTES), HALVES), every(HALVES, 8))
        return builder.fpext(builder.bitcast(wide, ir.VectorType(F16, LANES)), FLOATS)
    wide = builder.zext(load(builder, address, BYTES), WORDS)
    low = builder.and_(wide, every(WORDS, 0x7F))
    # As in `jit`: shift into place, then scale by 2^120.
    size = builder.fmul(builder.bitcast(builder.shl(low, every(WORDS, 20)), FLOATS), every(FLOATS, 2.0**120))
    size = builder.select(
        builder.icmp_unsigned("==", low, every(WORDS, 0x7F)), every(FLOATS, float("nan")), size
    )
    sign = builder.shl(builder.and_(wide, every(WORDS, 0x80)), every(WORDS, 24))
    return builder.bitcast(builder.or_(builder.bitcast(size, WORDS), sign), FLOATS)
