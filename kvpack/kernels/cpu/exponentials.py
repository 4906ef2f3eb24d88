"""Vector code for exponentials, to about two units in the last place of a float32.

``e^x = 2^n e^r`` with n the nearest whole number to x / ln 2 and r what is left, at most ln 2 / 2 in size.
ln 2 is subtracted in two pieces, the first of which has few bits, so that nothing is lost; e^r is a
polynomial. Coefficients: Cephes mathematical library, expf (S. L. Moshier).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu import vectors
from kvpack.kernels.cpu.codes import LANES, constant, load
from kvpack.kernels.cpu.jit import ADDRESS, I32, I64
from kvpack.kernels.cpu.vectors import FLOATS

_LEAST = -87.0
"""Below, e^x is no normal number and taken as 0."""
_PER_TWO = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def _vector(number: float) -> Any:
    return constant(FLOATS, [number] * LANES)


def _exponential(builder: Any, x: Any) -> Any:
    """e^x of sixteen numbers, none above 0."""
    kept = builder.select(builder.fcmp_ordered(">", x, _vector(_LEAST)), x, _vector(_LEAST))
    whole = vectors.call(builder, f"llvm.rint.v{LANES}f32", FLOATS, [builder.fmul(kept, _vector(_PER_TWO))])
    rest = vectors.fused(builder, whole, _vector(-_LN2_HIGH), kept)
    rest = vectors.fused(builder, whole, _vector(-_LN2_LOW), rest)
    value = _vector(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        value = vectors.fused(builder, value, rest, _vector(coefficient))
    value = vectors.fused(builder, value, builder.fmul(rest, rest), builder.fadd(rest, _vector(1.0)))
    wide = ir.VectorType(I32, LANES)
    exponent = builder.shl(builder.fptosi(whole, wide), constant(wide, [23] * LANES))
    found = builder.bitcast(builder.add(builder.bitcast(value, wide), exponent), FLOATS)
    return builder.select(builder.fcmp_ordered(">", x, _vector(_LEAST)), found, _vector(0.0))


@intrinsic
def exponentials(typing: Any, row: Any, count: Any, shift: Any) -> Any:
    """Put ``e^(x - shift)`` in the place of `count` numbers x <= shift, a multiple of 16; their sum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, count, shift = arguments
        highest = vectors.splat(builder, shift)

        def step(at: Any, held: list[Any]) -> list[Any]:
            place = builder.add(row, builder.mul(at, I64(4)))
            found = _exponential(builder, builder.fsub(load(builder, place, FLOATS), highest))
            vectors.store(builder, found, place)
            return [builder.fadd(held[0], found)]

        (sums,) = vectors.loop(builder, count, LANES, [_vector(0.0)], step)
        return vectors.total(builder, sums)

    return types.float32(ADDRESS, types.int64, types.float32), generate


@intrinsic
def exponential(typing: Any, x: Any) -> Any:
    """``e^x`` of one number x <= 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.extract_element(_exponential(builder, vectors.splat(builder, arguments[0])), I32(0))

    return types.float32(types.float32), generate
