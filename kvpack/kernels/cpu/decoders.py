"""Vector code that turns packed affine codes into float32 rows in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu.codes import LANES, load, unpack_words
from kvpack.kernels.cpu.jit import ADDRESS, F32, I32, I64
from kvpack.kernels.cpu.vectors import FLOATS, WIDTHS, loop, splat, store, switch

Grid = Callable[[Any], Iterable[Any]]
"""Steps and offsets of sixteen codes, given how many bytes their numbers stand behind the first."""


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


def _for_width(builder: Any, bits: Any, centred: Any, emit: Callable[[int, bool], None]) -> None:
    """Call ``emit(width, is_centred)`` for every width, each in a branch of its own."""
    key = builder.or_(builder.shl(bits, I64(1)), builder.and_(centred, I64(1)))
    cases = [2 * width + is_centred for width in WIDTHS for is_centred in (0, 1)]
    switch(builder, key, cases, lambda case: emit(case >> 1, bool(case & 1)))


def _decode(builder: Any, ends: Sequence[Any], count: Any, grid: Grid, width: int, centred: bool) -> None:
    """Decode `count` codes from one address to another; `grid` has a step and an offset for every lane."""
    codes, out = ends

    def body(at: Any, values: list[Any]) -> list[Any]:
        place = builder.mul(at, I64(4))
        source = builder.add(codes, builder.lshr(builder.mul(at, I64(width)), I64(3)))
        step, offset = grid(place)
        number = _number(builder, _codes(builder, source, width), step, offset, centred)
        store(builder, number, builder.add(out, place))
        return values

    loop(builder, count, LANES, [], body)


def _of_each(builder: Any, step: Any, offset: Any) -> Grid:
    """Steps and offsets that lie in memory, one per code."""
    return lambda place: [load(builder, builder.add(base, place), FLOATS) for base in (step, offset)]


def _of_all(builder: Any, step: Any, offset: Any) -> Grid:
    """One step and one offset."""
    same = [splat(builder, number) for number in (step, offset)]
    return lambda place: same


@intrinsic
def decode_each(
    typing: Any, codes: Any, out: Any, step: Any, offset: Any, count: Any, bits: Any, centred: Any
) -> Any:
    """Decode `count` codes, a multiple of 16, that have steps and offsets of their own (addresses).

    Reads exactly ``count * bits / 8`` bytes; writes ``(code - offset) * step`` where `centred` is 1,
    and ``code * step + offset`` where it is 0.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *ends, step, offset, count, bits, centred = arguments
        grid = _of_each(builder, step, offset)
        _for_width(builder, bits, centred, lambda *version: _decode(builder, ends, count, grid, *version))
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 7), generate


@intrinsic
def decode_same(
    typing: Any, codes: Any, out: Any, step: Any, offset: Any, count: Any, bits: Any, centred: Any
) -> Any:
    """Decode `count` codes, a multiple of 16, that share step and offset; else as `decode_each`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *ends, step, offset, count, bits, centred = arguments
        grid = _of_all(builder, step, offset)
        _for_width(builder, bits, centred, lambda *version: _decode(builder, ends, count, grid, *version))
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
        grid, width_bytes = _of_each(builder, step, offset), builder.mul(count, I64(4))

        def emit(width: int, is_centred: bool) -> None:
            def row(index: Any, values: list[Any]) -> list[Any]:
                places = ((codes, stride), (out, width_bytes))
                ends = [builder.add(base, builder.mul(index, size)) for base, size in places]
                _decode(builder, ends, count, grid, width, is_centred)
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

        def emit(width: int, is_centred: bool) -> None:
            code_bytes = builder.lshr(builder.mul(group, I64(width)), I64(3))

            def row(index: Any, values: list[Any]) -> list[Any]:
                first = builder.add(codes, builder.mul(index, stride))

                def one(g: Any, inner: list[Any]) -> list[Any]:
                    entry = builder.add(builder.mul(index, groups), g)
                    place = builder.mul(entry, I64(4))
                    pair = [load(builder, builder.add(base, place), F32) for base in (step, offset)]
                    source = builder.add(first, builder.mul(g, code_bytes))
                    ends = source, builder.add(out, builder.mul(place, group))
                    _decode(builder, ends, group, _of_all(builder, *pair), width, is_centred)
                    return inner

                return loop(builder, groups, 1, values, one)

            loop(builder, rows, 1, [], row)

        _for_width(builder, bits, centred, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 10), generate
