"""Vector code that encodes: ranges of numbers in their stored dtype, codes of a byte each, bit streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu import jit
from kvpack.kernels.cpu.codes import LANES, constant, load
from kvpack.kernels.cpu.jit import ADDRESS, F32, I8, I32, I64
from kvpack.kernels.cpu.stored_floats import BYTES, SIZES, WORDS, widened
from kvpack.kernels.cpu.vectors import FLOATS, WIDTHS, call, every, fused, loop, splat, store, switch, total

KINDS = (jit.FLOAT32, jit.FLOAT16, jit.BFLOAT16)
"""How numbers may be stored that are encoded."""


def _place(builder: Any, address: Any, index: Any, size: int) -> Any:
    return builder.add(address, builder.mul(index, I64(size)))


def _extremes(builder: Any, kind: int, address: Any, stride: Any, count: Any, step: int) -> list[Any]:
    """Least and greatest numbers of each lane, and words that are not 0 where a lane met NaN.

    Sixteen numbers are read ``stride * at`` bytes from the address on, at = 0, `step`, ... below `count`.
    """

    def body(at: Any, held: list[Any]) -> list[Any]:
        x = widened(builder, kind, builder.add(address, builder.mul(at, stride)))
        low = builder.select(builder.fcmp_ordered("<", x, held[0]), x, held[0])
        high = builder.select(builder.fcmp_ordered(">", x, held[1]), x, held[1])
        bad = builder.sext(builder.fcmp_unordered("uno", x, x), WORDS)
        return [low, high, builder.or_(held[2], bad)]

    far = float("inf")
    return loop(builder, count, step, [every(FLOATS, far), every(FLOATS, -far), every(WORDS, 0)], body)


@intrinsic
def range_same(typing: Any, numbers: Any, kind: Any, count: Any, low: Any, high: Any) -> Any:
    """Write the least and the greatest of `count` neighbours, a multiple of 16; NaN where one is NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, kind, count, low, high = arguments

        def emit(kind: int) -> None:
            *ends, bad = _extremes(builder, kind, numbers, I64(SIZES[kind]), count, LANES)
            word = call(builder, f"llvm.vector.reduce.or.v{LANES}i32", I32, [bad])
            met = builder.icmp_unsigned("!=", word, I32(0))
            for vector, name, out in zip(ends, ("fmin", "fmax"), (low, high), strict=True):
                end = call(builder, f"llvm.vector.reduce.{name}.v{LANES}f32", F32, [vector], ("nnan",))
                store(builder, builder.select(met, F32(float("nan")), end), out)

        switch(builder, kind, KINDS, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), generate


@intrinsic
def range_each(
    typing: Any, numbers: Any, kind: Any, stride: Any, count: Any, wide: Any, low: Any, high: Any
) -> Any:
    """`range_same` of each of `wide` columns, a multiple of 16, over `count` rows `stride` bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, kind, stride, count, wide, low, high = arguments

        def emit(kind: int) -> None:
            def columns(at: Any, values: list[Any]) -> list[Any]:
                first = _place(builder, numbers, at, SIZES[kind])
                *ends, bad = _extremes(builder, kind, first, stride, count, 1)
                met = builder.icmp_signed("!=", bad, every(WORDS, 0))
                for vector, out in zip(ends, (low, high), strict=True):
                    end = builder.select(met, every(FLOATS, float("nan")), vector)
                    store(builder, end, _place(builder, out, at, 4))
                return values

            loop(builder, wide, LANES, [], columns)

        switch(builder, kind, KINDS, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 7), generate


def _code(builder: Any, x: Any, step: Any, offset: Any, top: Any, centred: bool) -> Any:
    """Nearest codes, with the roundings of `kvpack.ops.affine.codes`."""
    name = f"llvm.rint.v{LANES}f32"
    if centred:
        code = builder.fadd(call(builder, name, FLOATS, [builder.fdiv(x, step)]), offset)
    else:
        code = call(builder, name, FLOATS, [builder.fdiv(builder.fsub(x, offset), step)])
    # NaN is not greater than 0.
    nothing = every(FLOATS, 0.0)
    code = builder.select(builder.fcmp_ordered(">", code, nothing), code, nothing)
    code = builder.select(builder.fcmp_ordered("<", code, top), code, top)
    return builder.trunc(builder.fptosi(code, WORDS), BYTES)


def _round(
    builder: Any, arguments: Sequence[Any], grid: Callable[[Any], tuple[Any, Any]], top: Any, centred: Any
) -> None:
    """Write the codes of `count` numbers; `grid` gives steps and offsets from an index on."""
    numbers, kind, out, count = arguments

    def emit(key: int) -> None:
        kind, is_centred = key >> 1, bool(key & 1)

        def body(at: Any, values: list[Any]) -> list[Any]:
            x = widened(builder, kind, _place(builder, numbers, at, SIZES[kind]))
            code = _code(builder, x, *grid(at), top, is_centred)
            builder.store(code, builder.inttoptr(builder.add(out, at), BYTES.as_pointer())).align = 1
            return values

        loop(builder, count, LANES, [], body)

    key = builder.or_(builder.shl(kind, I64(1)), builder.and_(centred, I64(1)))
    switch(builder, key, [2 * kind + is_centred for kind in KINDS for is_centred in (0, 1)], emit)


@intrinsic
def round_same(
    typing: Any, numbers: Any, kind: Any, out: Any, count: Any, step: Any, offset: Any, top: Any, centred: Any
) -> Any:
    """Codes, a byte each, of `count` numbers, a multiple of 16, that share step and offset.

    A code is ``round(x / step) + offset`` where `centred` is 1, ``round((x - offset) / step)`` where it
    is 0, from 0 to `top`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *held, step, offset, top, centred = arguments
        steps, offsets, tops = (splat(builder, number) for number in (step, offset, top))
        _round(builder, held, lambda at: (steps, offsets), tops, centred)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 4, *[types.float32] * 3, ADDRESS), generate


@intrinsic
def round_each(
    typing: Any, numbers: Any, kind: Any, out: Any, count: Any, step: Any, offset: Any, top: Any, centred: Any
) -> Any:
    """`round_same` of numbers that have steps and offsets of their own (addresses)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *held, step, offset, top, centred = arguments

        def grid(at: Any) -> tuple[Any, Any]:
            steps, offsets = (load(builder, _place(builder, base, at, 4), FLOATS) for base in (step, offset))
            return steps, offsets

        _round(builder, held, grid, splat(builder, top), centred)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 6, types.float32, ADDRESS), generate


def _stream(builder: Any, codes: Any, bits: int) -> Any:
    """Codes of a byte each as the bytes of their bit stream: pairs are joined, then pairs of pairs."""
    count = codes.type.count
    word = 8 // math.gcd(8, bits)
    lanes = ir.VectorType(I64, count // 8)
    held = builder.bitcast(codes, lanes)
    span = 1
    while span < word:
        lower = sum(((1 << span * bits) - 1) << at for at in range(0, 64, 16 * span))
        kept = builder.and_(held, every(lanes, lower))
        moved = builder.lshr(held, every(lanes, span * (8 - bits)))
        held = builder.or_(kept, builder.and_(moved, every(lanes, lower << span * bits)))
        span *= 2
    places = [first + i for first in range(0, count, word) for i in range(word * bits // 8)]
    raw = builder.bitcast(held, codes.type)
    return builder.shuffle_vector(raw, raw, constant(ir.VectorType(I32, len(places)), places))


def _packer(span: int) -> Any:
    def typed(typing: Any, codes: Any, out: Any, count: Any, bits: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, out, count, bits = arguments

            def emit(width: int) -> None:
                def body(at: Any, values: list[Any]) -> list[Any]:
                    read = load(builder, builder.add(codes, at), ir.VectorType(I8, span))
                    bytes_ = _stream(builder, read, width)
                    place = builder.add(out, builder.lshr(builder.mul(at, I64(width)), I64(3)))
                    pointer = builder.inttoptr(place, bytes_.type.as_pointer())
                    builder.store(bytes_, pointer).align = 1
                    return values

                loop(builder, count, span, [], body)

            switch(builder, bits, WIDTHS, emit)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 4), generate

    return intrinsic(typed)


pack_16, pack_32 = _packer(16), _packer(32)
"""Write the bit stream of `count` codes of a byte each, a multiple of so many: ``count * bits / 8`` bytes."""


@intrinsic
def squares(typing: Any, numbers: Any, kind: Any, others: Any, count: Any, out: Any) -> Any:
    """Write sums of squares over `count` numbers, a multiple of 16: of ``numbers - others``, of `numbers`.

    `others` are float32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, kind, others, count, out = arguments

        def emit(kind: int) -> None:
            def body(at: Any, sums: list[Any]) -> list[Any]:
                x = widened(builder, kind, _place(builder, numbers, at, SIZES[kind]))
                lost = builder.fsub(x, load(builder, _place(builder, others, at, 4), FLOATS))
                return [fused(builder, v, v, held) for v, held in zip((lost, x), sums, strict=True)]

            for i, found in enumerate(loop(builder, count, LANES, [every(FLOATS, 0.0)] * 2, body)):
                store(builder, total(builder, found), builder.add(out, I64(4 * i)))

        switch(builder, kind, KINDS, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), generate


@intrinsic
def write_byte(typing: Any, address: Any, number: Any) -> Any:
    """Write the low byte of an integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, number = arguments
        builder.store(builder.trunc(number, I8), builder.inttoptr(address, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64), generate
