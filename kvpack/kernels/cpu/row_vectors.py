"""Vector code for rows of 16, 32, ... float32 numbers: levels, small floats, rotations."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu import jit
from kvpack.kernels.cpu.codes import LANES, load, unpack_words
from kvpack.kernels.cpu.jit import ADDRESS, F16, F32, I8, I16, I32, I64
from kvpack.kernels.cpu.vectors import FLOATS, WIDTHS, loop, splat, store

FLOAT8_WIDE = 5
"""How a number is stored, beside the kinds of `jit`: float8_e5m2."""

BYTES, HALVES, WORDS = (ir.VectorType(kind, LANES) for kind in (I8, I16, I32))


def _switch(builder: Any, key: Any, emit: dict[int, Any]) -> None:
    """Run the code of a case, each in a branch of its own."""
    done = builder.append_basic_block("done")
    switch = builder.switch(key, done)
    for number, body in emit.items():
        block = builder.append_basic_block(f"case{number}")
        switch.add_case(I64(number), block)
        builder.position_at_end(block)
        body()
        builder.branch(done)
    builder.position_at_end(done)


@intrinsic
def look_up(typing: Any, codes: Any, out: Any, table: Any, count: Any, bits: Any) -> Any:
    """Write the numbers of a table [2^bits] that `count` codes stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, out, table, count, bits = arguments
        numbers = builder.inttoptr(table, F32.as_pointer())

        def of_width(width: int) -> Any:
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

            return lambda: loop(builder, count, LANES, [], body)

        _switch(builder, bits, {width: of_width(width) for width in WIDTHS})
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), generate


def _widened(builder: Any, kind: int, address: Any) -> Any:
    """Sixteen stored numbers as float32."""
    if kind == jit.FLOAT32:
        return load(builder, address, FLOATS)
    if kind == jit.FLOAT16:
        return builder.fpext(load(builder, address, ir.VectorType(F16, LANES)), FLOATS)
    if kind == jit.BFLOAT16:
        wide = builder.zext(load(builder, address, HALVES), WORDS)
        return builder.bitcast(builder.shl(wide, _words(16)), FLOATS)
    if kind == FLOAT8_WIDE:  # The upper half of a float16.
        wide = builder.shl(builder.zext(load(builder, address, BYTES), HALVES), _constant(HALVES, 8))
        return builder.fpext(builder.bitcast(wide, ir.VectorType(F16, LANES)), FLOATS)
    wide = builder.zext(load(builder, address, BYTES), WORDS)
    low = builder.and_(wide, _words(0x7F))
    # As in `jit`: shift into place, then scale by 2^120.
    size = builder.fmul(builder.bitcast(builder.shl(low, _words(20)), FLOATS), _constant(FLOATS, 2.0**120))
    size = builder.select(
        builder.icmp_unsigned("==", low, _words(0x7F)), _constant(FLOATS, float("nan")), size
    )
    sign = builder.shl(builder.and_(wide, _words(0x80)), _words(24))
    return builder.bitcast(builder.or_(builder.bitcast(size, WORDS), sign), FLOATS)


def _constant(kind: Any, number: float) -> Any:
    return ir.Constant(kind, [number] * LANES)


def _words(number: int) -> Any:
    return _constant(WORDS, number)


_SIZES = {jit.FLOAT32: 4, jit.FLOAT16: 2, jit.BFLOAT16: 2, jit.FLOAT8: 1, FLOAT8_WIDE: 1}


@intrinsic
def widen_row(typing: Any, source: Any, out: Any, count: Any, kind: Any) -> Any:
    """Write `count` stored numbers of a kind as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, out, count, kind = arguments

        def of_kind(stored: int) -> Any:
            def body(at: Any, values: list[Any]) -> list[Any]:
                place = builder.add(source, builder.mul(at, I64(_SIZES[stored])))
                store(builder, _widened(builder, stored, place), builder.add(out, builder.mul(at, I64(4))))
                return values

            return lambda: loop(builder, count, LANES, [], body)

        _switch(builder, kind, {stored: of_kind(stored) for stored in _SIZES})
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 4), generate


@intrinsic
def stretch(typing: Any, row: Any, step: Any, offset: Any, count: Any, stride: Any) -> Any:
    """``row * step + offset`` in place; steps and offsets lie `stride` bytes apart, 4 or 0 (one for all)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, step, offset, count, stride = arguments

        def pass_over(pair: Any) -> Any:
            def body(at: Any, values: list[Any]) -> list[Any]:
                place = builder.mul(at, I64(4))
                target = builder.add(row, place)
                by, plus = pair(place)
                moved = builder.fadd(builder.fmul(load(builder, target, FLOATS), by), plus)
                store(builder, moved, target)
                return values

            return lambda: loop(builder, count, LANES, [], body)

        def same(place: Any) -> Any:
            return [splat(builder, load(builder, base, F32)) for base in (step, offset)]

        def each(place: Any) -> Any:
            return [load(builder, builder.add(base, place), FLOATS) for base in (step, offset)]

        _switch(builder, stride, {0: pass_over(same), 4: pass_over(each)})
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
