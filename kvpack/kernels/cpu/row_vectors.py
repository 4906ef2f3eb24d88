"""Vector code for rows of 16, 32, ... float32 numbers: levels, small floats, rotations."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu.codes import LANES, load, unpack_words
from kvpack.kernels.cpu.jit import ADDRESS, F32, I32, I64
from kvpack.kernels.cpu.stored_floats import SIZES, WORDS, widened
from kvpack.kernels.cpu.vectors import FLOATS, WIDTHS, loop, splat, store, switch


@intrinsic
def look_up(typing: Any, codes: Any, out: Any, table: Any, count: Any, bits: Any) -> Any:
    """Write the numbers of a table [2^bits] that `count` codes stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, out, table, count, bits = arguments
        numbers = builder.inttoptr(table, F32.as_pointer())

        def emit(width: int) -> None:
            def body(at: Any, values: list[Any]) -> list[Any]:
                source = builder.add(codes, builder.lshr(builder.mul(at, I64(width)), I64(3)))
                places = builder.zext(unpack_words(builder, source, width), WORDS)
                found = ir.Constant(FLOATS, ir.Undefined)
                for lane in range(LANES):
                    place = builder.zext(builder.extract_element(places, I32(lane)), I64)
                    number = builder.load(builder.gep(numbers, [place]))
                    found = builder.insert_element(found, number, I32(lane))
                store(builder, found, builder.add(out, builder.mul(at, I64(4))))
                return values

            loop(builder, count, LANES, [], body)

        switch(builder, bits, WIDTHS, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), generate


@intrinsic
def widen_row(typing: Any, source: Any, out: Any, count: Any, kind: Any) -> Any:
    """Write `count` stored numbers of a kind as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, out, count, kind = arguments

        def emit(stored: int) -> None:
            def body(at: Any, values: list[Any]) -> list[Any]:
                place = builder.add(source, builder.mul(at, I64(SIZES[stored])))
                store(builder, widened(builder, stored, place), builder.add(out, builder.mul(at, I64(4))))
                return values

            loop(builder, count, LANES, [], body)

        switch(builder, kind, SIZES, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 4), generate


@intrinsic
def stretch(typing: Any, row: Any, step: Any, offset: Any, count: Any, stride: Any) -> Any:
    """``row * step + offset`` in place; steps and offsets lie `stride` bytes apart, 4 or 0 (one for all)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, step, offset, count, stride = arguments

        def emit(apart: int) -> None:
            def body(at: Any, values: list[Any]) -> list[Any]:
                place = builder.mul(at, I64(4))
                target = builder.add(row, place)
                by, plus = each(place) if apart else same()
                moved = builder.fadd(builder.fmul(load(builder, target, FLOATS), by), plus)
                store(builder, moved, target)
                return values

            loop(builder, count, LANES, [], body)

        def same() -> list[Any]:
            return [splat(builder, load(builder, base, F32)) for base in (step, offset)]

        def each(place: Any) -> list[Any]:
            return [load(builder, builder.add(base, place), FLOATS) for base in (step, offset)]

        switch(builder, stride, (0, 4), emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), generate


@intrinsic
def butterfly(typing: Any, first: Any, second: Any, count: Any) -> Any:
    """Replace two runs of `count` numbers by their sum and their difference."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, count = arguments

        def body(at: Any, values: list[Any]) -> list[Any]:
            place = builder.mul(at, I64(4))
            targets = [builder.add(base, place) for base in (first, second)]
            a, b = (load(builder, target, FLOATS) for target in targets)
            store(builder, builder.fadd(a, b), targets[0])
            store(builder, builder.fsub(a, b), targets[1])
            return values

        loop(builder, count, LANES, [], body)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 3), generate


@intrinsic
def butterflies_within(typing: Any, row: Any, count: Any, factor: Any) -> Any:
    """The last four passes of a Hadamard transform, among 16 neighbours each, and a factor."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, count, factor = arguments
        scale = splat(builder, factor)

        def body(at: Any, values: list[Any]) -> list[Any]:
            target = builder.add(row, builder.mul(at, I64(4)))
            x = load(builder, target, FLOATS)
            for half in (8, 4, 2, 1):
                order = ir.Constant(ir.VectorType(I32, LANES), [lane ^ half for lane in range(LANES)])
                signs = ir.Constant(FLOATS, [-1.0 if lane & half else 1.0 for lane in range(LANES)])
                x = builder.fadd(builder.shuffle_vector(x, x, order), builder.fmul(x, signs))
            store(builder, builder.fmul(x, scale), target)
            return values

        loop(builder, count, LANES, [], body)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.float32), generate


@intrinsic
def turned(typing: Any, out: Any, x: Any, partner: Any, own: Any, other: Any) -> Any:
    """Write ``own * x + other * partner`` of 16 numbers each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, *sources = arguments
        x, partner, own, other = (load(builder, source, FLOATS) for source in sources)
        store(builder, builder.fadd(builder.fmul(own, x), builder.fmul(other, partner)), out)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), generate
