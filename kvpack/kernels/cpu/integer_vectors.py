"""Vector code that multiplies packed codes with 16-bit integers; see `integer_rows`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu import vectors
from kvpack.kernels.cpu.codes import LANES, WORDS, constant, load, unpack_fields
from kvpack.kernels.cpu.jit import ADDRESS, F32, I8, I16, I32, I64

PAIRS = ir.VectorType(I32, LANES // 2)
HALVES = ir.VectorType(F32, LANES // 2)
TOGETHER = (1, 2, 4)
"""How many integer vectors are multiplied with a row at a time."""


def _pair_products(builder: Any, a: Any, b: Any) -> Any:
    """Products of 16-bit integers, each added to its neighbour's: eight 32-bit sums."""
    if vectors.has_avx2():
        return vectors.call(builder, "llvm.x86.avx2.pmadd.wd", PAIRS, [a, b])
    wide = ir.VectorType(I32, LANES)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (constant(PAIRS, range(first, LANES, 2)) for first in (0, 1))
    return builder.add(
        builder.shuffle_vector(product, product, even), builder.shuffle_vector(product, product, odd)
    )


def _each_version(builder: Any, key: Any, emit: Callable[[int, bool, int], None]) -> None:
    """A branch for every width, with and without whole words, and number of vectors."""
    done = builder.append_basic_block("multiplied")
    switch = builder.switch(key, done)
    for bits in vectors.WIDTHS:
        for fields in (False, True) if bits in (2, 4, 8) else (False,):
            for count in TOGETHER:
                block = builder.append_basic_block(f"bits{bits}x{count}")
                switch.add_case(I64(bits * 16 + fields * 8 + count), block)
                builder.position_at_end(block)
                emit(bits, fields, count)
                builder.branch(done)
    builder.position_at_end(done)


@intrinsic
def row(
    typing: Any,
    codes: Any,
    x: Any,
    stride: Any,
    steps: Any,
    factors: Any,
    groups: Any,
    each: Any,
    chunk: Any,
    out: Any,
    key: Any,
) -> Any:
    """Products of one row with vectors [n, C], `stride` numbers apart, to `out` [n].

    `steps` [groups] are the row's, `factors` [n, groups * each] the vectors'. `key` selects the version:
    ``bits * 16 + whole words * 8 + n``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, x, stride, steps, factors, groups, each, chunk, out, key = arguments
        stride_bytes = builder.mul(stride, I64(2))
        chunk_bytes = builder.mul(chunk, I64(2))
        line_bytes = builder.mul(builder.mul(groups, each), I64(4))

        def emit(bits: int, fields: bool, count: int) -> None:
            span = LANES * (16 // bits) if fields else LANES
            code_bytes = builder.lshr(builder.mul(chunk, I64(bits)), I64(3))

            def in_chunk(index: Any) -> list[Any]:
                """Sums of one chunk as integers."""
                source = builder.add(codes, builder.mul(index, code_bytes))
                numbers = builder.add(x, builder.mul(index, chunk_bytes))

                def step(first: Any, held: list[Any]) -> list[Any]:
                    place = builder.add(source, builder.lshr(builder.mul(first, I64(bits)), I64(3)))
                    for field, code in enumerate(unpack_fields(builder, place, bits, span)):
                        offset = builder.add(builder.mul(first, I64(2)), I64(2 * LANES * field))
                        for n in range(count):
                            line = builder.add(numbers, builder.mul(stride_bytes, I64(n)))
                            values = load(builder, builder.add(line, offset), WORDS)
                            held[n] = builder.add(held[n], _pair_products(builder, code, values))
                    return held

                none = [constant(PAIRS, [0] * (LANES // 2))] * count
                return vectors.loop(builder, chunk, span, none, step)

            def in_group(g: Any, totals: list[Any]) -> list[Any]:
                scale = load(builder, builder.add(steps, builder.mul(g, I64(4))), F32)

                def one(e: Any, held: list[Any]) -> list[Any]:
                    index = builder.add(builder.mul(g, each), e)
                    place = builder.add(factors, builder.mul(index, I64(4)))
                    results = []
                    for n, integers in enumerate(in_chunk(index)):
                        own = load(builder, builder.add(place, builder.mul(line_bytes, I64(n))), F32)
                        factor = vectors.splat(builder, builder.fmul(scale, own), HALVES)
                        results.append(
                            vectors.fused(builder, builder.sitofp(integers, HALVES), factor, held[n])
                        )
                    return results

                return vectors.loop(builder, each, 1, totals, one)

            nothing = [constant(HALVES, [0.0] * (LANES // 2))] * count
            totals = vectors.loop(builder, groups, 1, nothing, in_group)
            for n in range(count):
                vectors.store(builder, vectors.total(builder, totals[n]), builder.add(out, I64(4 * n)))

        _each_version(builder, key, emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 10), generate


@intrinsic
def sixteen_zeros(typing: Any, zeros: Any, steps: Any, sums: Any, count: Any) -> Any:
    """The sum of ``zero * step * sum`` over `count` groups, a multiple of 16; zeros are bytes with a sign."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros, steps, sums, count = arguments

        def step(at: Any, held: list[Any]) -> list[Any]:
            place = builder.mul(at, I64(4))
            zero = load(builder, builder.add(zeros, at), ir.VectorType(I8, LANES))
            numbers = builder.sitofp(builder.sext(zero, ir.VectorType(I32, LANES)), vectors.FLOATS)
            a, b = (load(builder, builder.add(base, place), vectors.FLOATS) for base in (steps, sums))
            return [vectors.fused(builder, builder.fmul(numbers, a), b, held[0])]

        nothing = constant(vectors.FLOATS, [0.0] * LANES)
        (result,) = vectors.loop(builder, count, LANES, [nothing], step)
        return vectors.total(builder, result)

    return types.float32(ADDRESS, ADDRESS, ADDRESS, types.int64), generate


@intrinsic
def write_word(typing: Any, address: Any, number: Any) -> Any:
    """Write a float32 number that is whole as a 16-bit integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], I16.as_pointer())
        word = builder.trunc(builder.fptosi(arguments[1], I32), I16)
        builder.store(word, place).align = 2
        return context.get_dummy_value()

    return types.void(ADDRESS, types.float32), generate
