"""Vector code that fits affine grids to ranges, with every rounding of `kvpack.ops.affine.fit`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu import jit
from kvpack.kernels.cpu.affine_rows import CENTRED, OFFSET
from kvpack.kernels.cpu.codes import LANES, load
from kvpack.kernels.cpu.jit import ADDRESS, F16, I64
from kvpack.kernels.cpu.stored_floats import BYTES, HALVES, WORDS
from kvpack.kernels.cpu.vectors import FLOATS, call, every, loop, splat, store, switch

LARGEST = {
    jit.FLOAT32: 3.4028234663852886e38,
    jit.FLOAT16: 65504.0,
    jit.BFLOAT16: 3.3895313892515355e38,
    jit.FLOAT8: 448.0,
}
"""The greatest numbers of steps, by how they are stored."""


def _either(builder: Any, sign: str, a: Any, b: Any) -> Any:
    """The lesser ("<") or greater of two numbers; NaN where one is."""
    chosen = builder.or_(builder.fcmp_ordered(sign, a, b), builder.fcmp_unordered("uno", a, a))
    return builder.select(chosen, a, b)


def _bounded(builder: Any, x: Any, low: float | None, high: float | None) -> Any:
    """Numbers between two bounds; NaN stays."""
    for bound, sign in ((low, "<"), (high, ">")):
        if bound is not None:
            limit = every(FLOATS, bound)
            x = builder.select(builder.fcmp_ordered(sign, x, limit), limit, x)
    return x


def _short(builder: Any, x: Any, kind: int) -> Any:
    """Nearest numbers as words that hold what is stored; float8 of numbers that are not negative."""
    if kind == jit.FLOAT16:
        half = builder.fptrunc(x, ir.VectorType(F16, LANES))
        return builder.zext(builder.bitcast(half, HALVES), WORDS)
    word = builder.bitcast(x, WORDS)
    shift = 16 if kind == jit.BFLOAT16 else 20
    odd = builder.and_(builder.lshr(word, every(WORDS, shift)), every(WORDS, 1))
    word = builder.add(builder.add(word, every(WORDS, (1 << shift - 1) - 1)), odd)
    near = builder.lshr(word, every(WORDS, shift))
    if kind == jit.BFLOAT16:
        return builder.select(builder.fcmp_unordered("uno", x, x), every(WORDS, 0x7FC0), near)
    # Exponents are about 7 instead of 127. Below 2^-6 numbers are multiples of 2^-9.
    near = builder.sub(near, every(WORDS, 120 << 3))
    multiple = call(builder, f"llvm.rint.v{LANES}f32", FLOATS, [builder.fmul(x, every(FLOATS, 2.0**9))])
    small = builder.fcmp_ordered("<", x, every(FLOATS, 2.0**-6))
    near = builder.select(
        small, builder.fptosi(builder.select(small, multiple, every(FLOATS, 0)), WORDS), near
    )
    return builder.select(builder.fcmp_unordered("uno", x, x), every(WORDS, 0x7F), near)


def _wide(builder: Any, word: Any, kind: int) -> Any:
    """Stored numbers as float32; float8 that are not negative."""
    if kind == jit.FLOAT16:
        return builder.fpext(builder.bitcast(builder.trunc(word, HALVES), ir.VectorType(F16, LANES)), FLOATS)
    if kind == jit.BFLOAT16:
        return builder.bitcast(builder.shl(word, every(WORDS, 16)), FLOATS)
    number = builder.fmul(
        builder.bitcast(builder.shl(word, every(WORDS, 20)), FLOATS), every(FLOATS, 2.0**120)
    )
    nan = builder.icmp_signed("==", word, every(WORDS, 0x7F))
    return builder.select(nan, every(FLOATS, float("nan")), number)


def _towards(builder: Any, x: Any, kind: int, up: bool) -> tuple[Any, Any]:
    """`kvpack.ops.affine.round_towards`: what is stored, and the numbers it stands for."""
    x = _bounded(builder, x, -LARGEST[kind], LARGEST[kind])
    if kind == jit.FLOAT32:
        return x, x
    word = _short(builder, x, kind)
    wrong = builder.fcmp_ordered("<" if up else ">", _wide(builder, word, kind), x)
    negative = builder.icmp_signed(">=", word, every(WORDS, 0x8000))
    one, minus = every(WORDS, 1), every(WORDS, -1)
    outward = builder.select(negative, *((minus, one) if up else (one, minus)))
    word = builder.add(word, builder.select(wrong, outward, every(WORDS, 0)))
    return builder.trunc(word, BYTES if kind == jit.FLOAT8 else HALVES), _wide(builder, word, kind)


def _stored(builder: Any, step: Any, kind: int) -> tuple[Any, Any]:
    step = _bounded(builder, step, 0.0, None)
    constant = builder.fcmp_ordered("==", step, every(FLOATS, 0))
    return _towards(builder, builder.select(constant, every(FLOATS, 1), step), kind, up=True)


def _widened(builder: Any, step: Any, low: Any, high: Any, top: Any, half: Any) -> Any:
    """`kvpack.ops.affine._widened`; dividing by 128 - `half` = 0 gives infinity, which is not chosen."""
    below = builder.fdiv(builder.fneg(low), builder.fadd(every(FLOATS, 127), half))
    step = _either(builder, ">", step, below)
    reach = builder.fdiv(low, builder.fsub(every(FLOATS, 128), half))
    reach = _either(builder, "<", reach, builder.fdiv(high, top))
    positive = builder.fcmp_ordered(">", low, every(FLOATS, 0))
    step = builder.select(positive, _either(builder, ">", step, reach), step)
    size = call(builder, f"llvm.fabs.v{LANES}f32", FLOATS, [low])
    same = builder.fcmp_ordered("==", low, high)
    return builder.select(same, builder.fdiv(size, every(FLOATS, 64)), step)


def _integer_zero(builder: Any, low: Any, step: Any, half: Any) -> Any:
    """Integer zeros less `half`, as float32."""
    name = f"llvm.rint.v{LANES}f32"
    zero = call(builder, name, FLOATS, [builder.fdiv(builder.fneg(low), step)])
    lower, upper = (builder.fadd(half, every(FLOATS, bound)) for bound in (-128, 127))
    zero = builder.select(builder.fcmp_ordered("<", zero, lower), lower, zero)
    zero = builder.select(builder.fcmp_ordered(">", zero, upper), upper, zero)
    zero = builder.fsub(zero, half)
    return builder.select(builder.fcmp_unordered("uno", zero, zero), every(FLOATS, 0), zero)


def _grid(builder: Any, low: Any, high: Any, top: Any, half: Any, scales: int, zeros: int) -> list[Any]:
    """Steps, offsets, both as they are stored (no zero of a symmetric grid)."""
    if zeros == OFFSET:
        kind = jit.FLOAT16 if scales == jit.FLOAT8 else scales
        zero, offset = _towards(builder, low, kind, up=False)
        scale, step = _stored(builder, builder.fdiv(builder.fsub(high, offset), top), scales)
        return [step, offset, scale, zero]
    if zeros == CENTRED:
        above = builder.fdiv(high, builder.fsub(half, every(FLOATS, 1)))
        wanted = _either(builder, ">", above, builder.fdiv(builder.fneg(low), half))
        scale, step = _stored(builder, wanted, scales)
        return [step, half, scale]
    wanted = builder.fdiv(builder.fsub(high, low), top)
    scale, step = _stored(builder, _widened(builder, wanted, low, high, top, half), scales)
    zero = _integer_zero(builder, low, step, half)
    return [step, builder.fadd(zero, half), scale, builder.trunc(builder.fptosi(zero, WORDS), BYTES)]


@intrinsic
def fit(
    typing: Any,
    low: Any,
    high: Any,
    step: Any,
    offset: Any,
    scale: Any,
    zero: Any,
    count: Any,
    top: Any,
    half: Any,
    scales: Any,
    zeros: Any,
) -> Any:
    """Write the grids of `count` unclipped ranges: steps, offsets, and both as they are stored.

    Whole vectors are read and written. `top` is the highest code, `half` half of the number of codes.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *held, count, top, half, scales, zeros = arguments
        tops, halves = splat(builder, top), splat(builder, half)

        def emit(key: int) -> None:
            def body(at: Any, values: list[Any]) -> list[Any]:
                place = builder.mul(at, I64(4))
                low, high = (load(builder, builder.add(base, place), FLOATS) for base in held[:2])
                found = _grid(builder, low, high, tops, halves, key % 4, key // 4)
                for vector, base in zip(found, held[2:], strict=False):
                    size = getattr(vector.type.element, "width", 32) // 8  # floats have no width
                    store(builder, vector, builder.add(base, builder.mul(at, I64(size))))
                return values

            loop(builder, count, LANES, [], body)

        switch(builder, builder.add(builder.mul(zeros, I64(4)), scales), range(12), emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 7, types.float32, types.float32, ADDRESS, ADDRESS), generate
