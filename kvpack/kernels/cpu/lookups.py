"""Vector code of `lookup_rows`: codes to words, four levels, vectors of a codebook, kept numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu import jit, vectors
from kvpack.kernels.cpu.codes import LANES, WORDS, constant, load, unpack_words
from kvpack.kernels.cpu.jit import ADDRESS, F32, I16, I32, I64, device

SIZES = (2, 4, 8)
"""Lengths of vectors that are copied as vectors."""
MULTIPLIED = 8
"""Vectors that one step of a product takes at most."""
TOGETHER = 4
"""Vectors, or pairs of groups, that one step takes."""

_EIGHT = ir.VectorType(F32, 8)
_FOUR = ir.VectorType(F32, 4)
_PLACES = ir.VectorType(I32, 8)


def _shuffled(builder: Any, a: Any, b: Any, places: Any) -> Any:
    places = list(places)
    return builder.shuffle_vector(a, b, constant(ir.VectorType(I32, len(places)), places))


@intrinsic
def unpack_row(typing: Any, codes: Any, out: Any, count: Any, bits: Any) -> Any:
    """Write `count` codes, a multiple of 16, as 16-bit words to `out`; reads ``count * bits / 8`` bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, out, count, bits = arguments

        def emit(width: int) -> None:
            def body(at: Any, values: list[Any]) -> list[Any]:
                source = builder.add(codes, builder.lshr(builder.mul(at, I64(width)), I64(3)))
                words = unpack_words(builder, source, width)
                vectors.store(builder, words, builder.add(out, builder.mul(at, I64(2))))
                return values

            vectors.loop(builder, count, LANES, [], body)

        vectors.switch(builder, bits, vectors.WIDTHS, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 4), generate


@intrinsic
def on_a_grid(typing: Any, words: Any, out: Any, count: Any, step: Any, offset: Any, centred: Any) -> Any:
    """Write ``word * step + offset``, or where `centred` is 1 ``(word - offset) * step``, of `count` words.

    `count` is a multiple of 16.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, out, count, step, offset, centred = arguments
        steps, offsets = (vectors.splat(builder, number) for number in (step, offset))

        def emit(is_centred: int) -> None:
            def body(at: Any, values: list[Any]) -> list[Any]:
                found = load(builder, builder.add(words, builder.mul(at, I64(2))), WORDS)
                code = builder.sitofp(builder.zext(found, ir.VectorType(I32, LANES)), vectors.FLOATS)
                if is_centred:
                    number = builder.fmul(builder.fsub(code, offsets), steps)
                else:
                    number = builder.fadd(builder.fmul(code, steps), offsets)
                vectors.store(builder, number, builder.add(out, builder.mul(at, I64(4))))
                return values

            vectors.loop(builder, count, LANES, [], body)

        vectors.switch(builder, centred, (0, 1), emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 3, types.float32, types.float32, ADDRESS), generate


def _levels_of(builder: Any, levels: Any, codes: Any) -> Any:
    """Eight of four levels, by the two lowest bits of 32-bit lanes."""
    if vectors.has_avx2():
        table = _shuffled(builder, levels, levels, [0, 1, 2, 3] * 2)
        return vectors.call(builder, "llvm.x86.avx.vpermilvar.ps.256", _EIGHT, [table, codes])
    none = constant(_PLACES, [0] * 8)
    odd, high = (
        builder.icmp_unsigned("!=", builder.and_(codes, constant(_PLACES, [bit] * 8)), none) for bit in (1, 2)
    )
    each = [_shuffled(builder, levels, levels, [level] * 8) for level in range(4)]
    low = builder.select(odd, each[1], each[0])
    return builder.select(high, builder.select(odd, each[3], each[2]), low)


@intrinsic
def four_levels(typing: Any, codes: Any, out: Any, group: Any, groups: Any, levels: Any) -> Any:
    """Write the levels of 2-bit codes to `out`: whole groups of `group` codes, a multiple of 16.

    `levels` float32 [groups, 4] is an address, as `codes` and `out` are.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, out, group, groups, levels = arguments

        def one_group(index: Any, values: list[Any]) -> list[Any]:
            held = load(builder, builder.add(levels, builder.mul(index, I64(16))), _FOUR)
            begin = builder.mul(index, group)

            def body(at: Any, values: list[Any]) -> list[Any]:
                first = builder.add(begin, at)
                word = load(builder, builder.add(codes, builder.lshr(first, I64(2))), I32)
                same = vectors.splat(builder, word, _PLACES)
                for half in range(2):
                    shifts = constant(_PLACES, range(16 * half, 16 * half + 16, 2))
                    numbers = _levels_of(builder, held, builder.lshr(same, shifts))
                    place = builder.add(builder.mul(first, I64(4)), I64(32 * half))
                    vectors.store(builder, numbers, builder.add(out, place))
                return values

            vectors.loop(builder, group, LANES, [], body)
            return values

        vectors.loop(builder, groups, 1, [], one_group)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), generate


@intrinsic
def copy_vectors(typing: Any, words: Any, book: Any, out: Any, count: Any, size: Any, scale: Any) -> Any:
    """Write the vectors of a codebook that `count` words name, a multiple of 4, times `scale`, to `out`.

    A vector has one of the `SIZES`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, book, out, count, size, scale = arguments

        def emit(width: int) -> None:
            kind = ir.VectorType(F32, width)

            def vector(place: Any, index: int) -> Any:
                source = builder.add(words, builder.mul(builder.add(place, I64(index)), I64(2)))
                word = builder.zext(load(builder, source, I16), I64)
                return load(builder, builder.add(book, builder.mul(word, I64(4 * width))), kind)

            def body(at: Any, values: list[Any]) -> list[Any]:
                found = [vector(at, index) for index in range(TOGETHER)]
                if width == 2:
                    pairs = zip(found[::2], found[1::2], strict=True)
                    found = [_shuffled(builder, *pair, range(4)) for pair in pairs]
                target = builder.add(out, builder.mul(at, I64(4 * width)))
                for index, numbers in enumerate(found):
                    scaled = builder.fmul(numbers, vectors.splat(builder, scale, numbers.type))
                    place = builder.add(target, I64(4 * numbers.type.count * index))
                    vectors.store(builder, scaled, place)
                return values

            vectors.loop(builder, count, TOGETHER, [], body)

        vectors.switch(builder, size, SIZES, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5, types.float32), generate


@intrinsic
def vectors_product(typing: Any, words: Any, book: Any, x: Any, count: Any, size: Any) -> Any:
    """The product of x with the vectors that `count` words name, a multiple of 8; as `copy_vectors`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, book, x, count, size = arguments
        out = builder.alloca(F32)

        def emit(width: int) -> None:
            each, joined = ir.VectorType(F32, width), ir.VectorType(F32, max(4, width))
            per = joined.count // width

            def body(at: Any, sums: list[Any]) -> list[Any]:
                found = []
                for index in range(TOGETHER * per):
                    place = builder.add(words, builder.mul(builder.add(at, I64(index)), I64(2)))
                    entry = builder.mul(builder.zext(load(builder, place, I16), I64), I64(4 * width))
                    found.append(load(builder, builder.add(book, entry), each))
                if per == 2:
                    pairs = zip(found[::2], found[1::2], strict=True)
                    found = [_shuffled(builder, *pair, range(4)) for pair in pairs]
                results = []
                for index, (vector, held) in enumerate(zip(found, sums, strict=True)):
                    source = builder.add(x, builder.mul(at, I64(4 * width)))
                    numbers = load(builder, builder.add(source, I64(4 * joined.count * index)), joined)
                    results.append(vectors.fused(builder, vector, numbers, held))
                return results

            none = [constant(joined, [0.0] * joined.count)] * TOGETHER
            sums = vectors.loop(builder, count, TOGETHER * per, none, body)
            whole = builder.fadd(builder.fadd(*sums[:2]), builder.fadd(*sums[2:]))
            builder.store(vectors.total(builder, whole), out)

        vectors.switch(builder, size, SIZES, emit)
        return builder.load(out)

    return types.float32(*[ADDRESS] * 5), generate


@intrinsic
def _kept_product(typing: Any, numbers: Any, words: Any, x: Any, table: Any, count: Any) -> Any:
    """See `kept_product`, for processors that shuffle eight numbers at once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, words, x, table, count = arguments

        def body(at: Any, sums: list[Any]) -> list[Any]:
            results = []
            for index, held in enumerate(sums):
                place = builder.add(at, I64(index))
                word = load(builder, builder.add(words, builder.mul(place, I64(2))), I16)
                entry = builder.add(table, builder.mul(builder.zext(word, I64), I64(32)))
                source = builder.add(x, builder.mul(place, I64(32)))
                pair = [load(builder, source, _EIGHT), load(builder, entry, _PLACES)]
                chosen = vectors.call(builder, "llvm.x86.avx2.permps", _EIGHT, pair)
                four = load(builder, builder.add(numbers, builder.mul(place, I64(16))), _FOUR)
                results.append(
                    vectors.fused(builder, _shuffled(builder, chosen, chosen, range(4)), four, held)
                )
            return results

        sums = vectors.loop(builder, count, TOGETHER, [constant(_FOUR, [0.0] * 4)] * TOGETHER, body)
        whole = builder.fadd(builder.fadd(*sums[:2]), builder.fadd(*sums[2:]))
        return vectors.total(builder, whole)

    return types.float32(*[ADDRESS] * 5), generate


@device
def _kept_product_anywhere(numbers: Any, words: Any, x: Any, table: Any, count: Any) -> Any:
    """See `kept_product`."""
    total = np.float32(0)
    for pair in range(count):
        entry = table + 32 * jit.read_word(words + 2 * pair)
        for index in range(4):
            place = 8 * pair + jit.read_word(entry + 4 * index)
            total += jit.read_float(numbers + 4 * (4 * pair + index)) * jit.read_float(x + 4 * place)
    return total


kept_product = _kept_product if vectors.has_avx2() else _kept_product_anywhere
"""The product of kept numbers with those of x at their places, for `count` pairs of groups (a multiple of 4).

Arguments are addresses: `numbers` float32 [4 * count], two of every group; `words`, the two patterns of
every pair in one word; `x` float32 [8 * count]; `table` int32 [64, 8], of every such word the four places
within eight neighbours."""
