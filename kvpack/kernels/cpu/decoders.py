"""Vector code that turns packed affine codes into float32 rows in memory."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu.codes import LANES, load, unpack_words
from kvpack.kernels.cpu.jit import ADDRESS, F32, I32, I64
from kvpack.kernels.cpu.vectors import FLOATS, WIDTHS, loop, splat, store


def _codes(builder: Any, address: Any, bits: int) -> Any:
    """Sixteen codes as float32."""
    # By way of signed 32-bit integers, which CPUs turn into floats at once.
    wide = builder.zext(unpack_words(builder, address, bits), ir.VectorType(I32, LANES))
    return builder.sitofp(wide, FLOATS)


def _number(builder: Any, codes: Any, step: Any, offset: Any, centred: bool) -> Any:
    """What codes stand for, with the roundings of `kvpack.ops.affine.values`."""
    if centred:
        return builder.fmul(builder.fsub(codes, offset), step)
    return builder.fadd(builder.fmul(codes, step), offset)


def _for_width(builder: Any, bits: Any, centred: Any, emit: Any) -> None:
    """Call ``emit(width, is_centred)`` for every width, each in a branch of its own."""
    done = builder.append_basic_block("decoded")
    key = builder.or_(builder.shl(bits, I64(1)), builder.and_(centred, I64(1)))
    switch = builder.switch(key, done)
    for width in WIDTHS:
        for is_centred in (False, True):
            block = builder.append_basic_block(f"bits{width}")
            switch.add_case(I64(2 * width + is_centred), block)
            builder.position_at_end(block)
            emit(width, is_centred)
            builder.branch(done)
    builder.position_at_end(done)


@intrinsic
def decode_each(
    typing: Any, codes: Any, out: Any, step: Any, offset: Any, count: Any, bits: Any, centred: Any
) -> Any:
    """Decode `count` codes, a multiple of 16, that have steps and offsets of their own (addresses).

    Reads exactly ``count * bits / 8`` bytes; writes ``(code - offset) * step`` where `centred` is 1,
    and ``code * step + offset`` where it is 0.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, out, step, offset, count, bits, centred = arguments

        def emit(width: int, is_centred: bool) -> None:
            def body(at: Any, values: list[Any]) -> list[Any]:
                place = builder.mul(at, I64(4))
                source = builder.add(codes, builder.lshr(builder.mul(at, I64(width)), I64(3)))
                steps, offsets = (load(builder, builder.add(base, place), FLOATS) for base in (step, offset))
                number = _number(builder, _codes(builder, source, width), steps, offsets, is_centred)
                store(builder, number, builder.add(out, place))
                return values

            loop(builder, count, LANES, [], body)

        _for_width(builder, bits, centred, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 7), generate


@intrinsic
def decode_same(
    typing: Any, codes: Any, out: Any, step: Any, offset: Any, count: Any, bits: Any, centred: Any
) -> Any:
    """Decode `count` codes, a multiple of 16, that share step and offset; else as `decode_each`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, out, step, offset, count, bits, centred = arguments
        steps, offsets = (splat(builder, number) for number in (step, offset))

        def emit(width: int, is_centred: bool) -> None:
            def body(at: Any, values: list[Any]) -> list[Any]:
                source = builder.add(codes, builder.lshr(builder.mul(at, I64(width)), I64(3)))
                number = _number(builder, _codes(builder, source, width), steps, offsets, is_centred)
                store(builder, number, builder.add(out, builder.mul(at, I64(4))))
                return values

            loop(builder, count, LANES, [], body)

        _for_width(builder, bits, centred, emit)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.float32, types.float32, *[ADDRESS] * 3), generate


@intrinsic
def decode_rows_each(
    typing: Any,
    codes: Any,
    stride: Any,
    out: Any,
    step: Any,
    offset: Any,
    count: Any,
    rows: Any,
    bits: Any,
    centred: Any,
) -> Any:
    """`decode_each` for `rows` rows, `stride` bytes apart, with the same steps and offsets."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, out, step, offset, count, rows, bits, centred = arguments
        width_bytes = builder.mul(count, I64(4))

        def emit(width: int, is_centred: bool) -> None:
            def row(index: Any, values: list[Any]) -> list[Any]:
                first, target = (
                    builder.add(base, builder.mul(index, size))
                    for base, size in ((codes, stride), (out, width_bytes))
                )

                def body(at: Any, inner: list[Any]) -> list[Any]:
                    place = builder.mul(at, I64(4))
                    source = builder.add(first, builder.lshr(builder.mul(at, I64(width)), I64(3)))
                    steps, offsets = (
                        load(builder, builder.add(base, place), FLOATS) for base in (step, offset)
                    )
                    number = _number(builder, _codes(builder, source, width), steps, offsets, is_centred)
                    store(builder, number, builder.add(target, place))
                    return inner

                loop(builder, count, LANES, [], body)
                return values

            loop(builder, rows, 1, [], row)

        _for_width(builder, bits, centred, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 9), generate


@intrinsic
def decode_rows_grouped(
    typing: Any,
    codes: Any,
    stride: Any,
    out: Any,
    step: Any,
    offset: Any,
    group: Any,
    groups: Any,
    rows: Any,
    bits: Any,
    centred: Any,
) -> Any:
    """`decode_same` for `rows` rows of `groups` groups of `group` codes, a multiple of 16.

    Steps and offsets [rows, groups] lie one after another, and so do the rows that are written.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, out, step, offset, group, groups, rows, bits, centred = arguments
        group_bytes = builder.mul(group, I64(4))

        def emit(width: int, is_centred: bool) -> None:
            code_bytes = builder.lshr(builder.mul(group, I64(width)), I64(3))

            def row(index: Any, values: list[Any]) -> list[Any]:
                first = builder.add(codes, builder.mul(index, stride))
                begin = builder.mul(index, groups)

                def one(g: Any, middle: list[Any]) -> list[Any]:
                    entry = builder.add(begin, g)
                    place = builder.mul(entry, I64(4))
                    steps, offsets = (
                        splat(builder, load(builder, builder.add(base, place), F32))
                        for base in (step, offset)
                    )
                    start = builder.add(first, builder.mul(g, code_bytes))
                    target = builder.add(out, builder.mul(entry, group_bytes))

                    def body(at: Any, inner: list[Any]) -> list[Any]:
                        source = builder.add(start, builder.lshr(builder.mul(at, I64(width)), I64(3)))
                        number = _number(builder, _codes(builder, source, width), steps, offsets, is_centred)
                        store(builder, number, builder.add(target, builder.mul(at, I64(4))))
                        return inner

                    loop(builder, group, LANES, [], body)
                    return middle

                loop(builder, groups, 1, [], one)
                return values

            loop(builder, rows, 1, [], row)

        _for_width(builder, bits, centred, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 10), generate
