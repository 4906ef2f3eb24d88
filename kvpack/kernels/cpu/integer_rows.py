"""Products of a few vectors with many rows of affine codes, in integers: the decode path of linears.

The vectors are rounded to 16-bit integers with one factor per chunk of up to 128 channels. A chunk's
codes are multiplied with them in integers, two products and their sum in one instruction, and only
the chunk's sum becomes a float:

    y_r = sum over chunks of  step * factor * sum_j code_j * x_j   +  sum over groups of  low * sum_j x_j

with ``low`` the number that code 0 stands for. Rounding x this way errs by 2^-16 of the chunk's
largest number; numbers that came as float32 get a second integer for what the first one left over.

Every thread rounds the vectors for itself: that takes less time than waiting for another to do it.

Numbers of a frame beside the pool's five (addresses; strides in bytes):

     5 R, 6 C, 7 vectors, 8 rows per item, 9 codes, 10 stride of a row, 11 scale, 12 stride, 13 zero,
    14 stride, 15 channels per group, 16 channels per chunk, 17 width of a code, 18 how steps are
    stored, 19 how zeros are, 20 codes in a word (1 where they are taken in order), 21 the vectors
    float32 [n, C], 22 integers per number (1 or 2), 23 output [n, R]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from kvpack.kernels.cpu import jit, vectors
from kvpack.kernels.cpu.affine_rows import CENTRED_INTEGER, OFFSET
from kvpack.kernels.cpu.codes import LANES, WORDS, constant, load, unpack_fields
from kvpack.kernels.cpu.jit import ADDRESS, ENTRY, F32, I8, I16, I32, I64, at, device

PAIRS = ir.VectorType(I32, LANES // 2)
HALVES = ir.VectorType(F32, LANES // 2)
TOGETHER = (1, 2, 4)
"""How many integer vectors are multiplied with a row at a time."""


def _pair_products(builder: Any, a: Any, b: Any) -> Any:
    """Products of 16-bit integers, each added to its neighbour's: eight 32-bit sums."""
    if _on_x86():
        return vectors.call(builder, "llvm.x86.avx2.pmadd.wd", PAIRS, [a, b])
    wide = ir.VectorType(I32, LANES)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (constant(PAIRS, range(first, LANES, 2)) for first in (0, 1))
    return builder.add(
        builder.shuffle_vector(product, product, even), builder.shuffle_vector(product, product, odd)
    )


@functools.cache
def _on_x86() -> bool:
    from llvmlite import binding

    return bool(dict(binding.get_host_cpu_features()).get("avx2"))


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
def _row(
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
def _sixteen_zeros(typing: Any, zeros: Any, steps: Any, sums: Any, count: Any) -> Any:
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


@device
def _zero_term(zeros: Any, zero: Any, half: Any, steps: Any, lows: Any, sums: Any, groups: Any) -> Any:
    """What codes of 0 stand for, times the sums of the vector: the part of a product without codes."""
    if zeros == OFFSET:
        return vectors.product(lows, sums, groups)
    total = half * vectors.product(steps, sums, groups)
    if zeros == CENTRED_INTEGER:
        whole = groups // LANES * LANES
        if whole:
            total += _sixteen_zeros(zero, steps, sums, whole)
        for g in range(whole, groups):
            total += jit.read_int8(zero + g) * jit.read_float(steps + 4 * g) * jit.read_float(sums + 4 * g)
    return -total


@intrinsic
def _write_word(typing: Any, address: Any, number: Any) -> Any:
    """Write a float32 number that is whole as a 16-bit integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], I16.as_pointer())
        word = builder.trunc(builder.fptosi(arguments[1], I32), I16)
        builder.store(word, place).align = 2
        return context.get_dummy_value()

    return types.void(ADDRESS, types.float32), generate


@device
def _whole(number: Any) -> Any:
    """The nearest whole number, of less than 2^22: where floats have no fraction left, adding rounds."""
    return number + np.float32(12582912) - np.float32(12582912)


@device
def _round_chunk(
    source: Any, chunk: Any, fields: Any, inverse: Any, out: Any, numbers: Any, rest: Any
) -> Any:
    """Integers of a chunk, in the order of the codes; `rest` leaves what was rounded off in `numbers`."""
    for j in range(chunk):
        exact = jit.read_float(source + 4 * j) * inverse
        whole = _whole(exact)
        if rest:
            jit.write_float(numbers + 4 * j, (exact - whole) * np.float32(32767))
        else:
            jit.write_float(numbers + 4 * j, whole)
    if fields == 1:
        for j in range(chunk):
            _write_word(out + 2 * j, _whole(jit.read_float(numbers + 4 * j)))
        return
    for first in range(0, chunk, fields * LANES):
        for field in range(fields):
            target, place = out + 2 * (first + field * LANES), numbers + 4 * (first + field)
            for lane in range(LANES):
                _write_word(target + 2 * lane, _whole(jit.read_float(place + 4 * lane * fields)))


@device
def _round_vectors(f: Any, integers: Any, factors: Any, sums: Any, numbers: Any) -> Any:
    """Integers [n * per, C], factors [n * per, C / chunk] and sums [n, C / group] of the vectors."""
    channels, count, chunk, per = at(f, 6), at(f, 7), at(f, 16), at(f, 22)
    chunks, each, fields = channels // chunk, at(f, 15) // chunk, at(f, 20)
    jit.fill(sums, count * channels // at(f, 15), 0.0)
    for n in range(count):
        source = at(f, 21) + 4 * n * channels
        line, target = factors + 4 * n * per * chunks, integers + 2 * n * per * channels
        for c in range(chunks):
            vectors.peak_and_sum(source + 4 * c * chunk, chunk, numbers)
            # A chunk of zeros has a factor, too.
            factor = max(jit.read_float(numbers), np.float32(1e-30)) / np.float32(32767)
            place = sums + 4 * ((n * chunks + c) // each)
            jit.write_float(place, jit.read_float(place) + jit.read_float(numbers + 4))
            jit.write_float(line + 4 * c, factor)
            inverse, out = np.float32(1) / factor, target + 2 * c * chunk
            _round_chunk(source + 4 * c * chunk, chunk, fields, inverse, out, numbers, False)
            if per == 2:
                jit.write_float(line + 4 * (chunks + c), factor / np.float32(32767))
                _round_chunk(
                    source + 4 * c * chunk, chunk, fields, inverse, out + 2 * channels, numbers, True
                )


@device
def _item(f: Any, first: Any, last: Any, room: Any, words: Any, scales: Any, sums: Any) -> Any:
    """Rows `first` to `last` with the vectors' integers, factors and sums; `room` is scratch."""
    rows, channels, group, chunk, per = at(f, 5), at(f, 6), at(f, 15), at(f, 16), at(f, 22)
    integers, chunks, groups, zeros = at(f, 7) * per, channels // chunk, channels // group, at(f, 19)
    half, each = np.float32(1 << (at(f, 17) - 1)), group // chunk
    version = at(f, 17) * 16 + (8 if at(f, 20) > 1 else 0)
    found, steps = room, room + 4 * 8
    lows = steps + 4 * groups
    # Beside a float8 step the zero is float16.
    kind = jit.FLOAT16 if at(f, 18) == jit.FLOAT8 else at(f, 18)
    for r in range(first, last):
        zero = at(f, 13) + r * at(f, 14)
        jit.widen(at(f, 11) + r * at(f, 12), at(f, 18), groups, steps)
        if zeros == OFFSET:
            jit.widen(zero, kind, groups, lows)
        begin = 0
        while begin < integers:
            together = 4 if integers - begin >= 4 else 2 if integers - begin >= 2 else 1
            source, x = at(f, 9) + r * at(f, 10), words + 2 * begin * channels
            line = scales + 4 * begin * chunks
            _row(source, x, channels, steps, line, groups, each, chunk, found, version + together)
            for n in range(together):
                vector = (begin + n) // per
                place = at(f, 23) + 4 * (vector * rows + r)
                total = jit.read_float(found + 4 * n)
                if (begin + n) % per:
                    total += jit.read_float(place)
                else:
                    total += _zero_term(zeros, zero, half, steps, lows, sums + 4 * vector * groups, groups)
                jit.write_float(place, total)
            begin += together


@device
def _work(f: Any) -> Any:
    """Take items of rows until none is left."""
    channels, count = at(f, 6), at(f, 7) * at(f, 22)
    chunks, groups = channels // at(f, 16), channels // at(f, 15)
    words = at(f, 3) + jit.add_to(f + 16, 1) * at(f, 4)
    scales = words + 2 * count * channels
    sums = scales + 4 * count * chunks
    room = sums + 4 * at(f, 7) * groups
    _round_vectors(f, words, scales, sums, room)
    while True:
        item = jit.add_to(f, 1)
        if item >= at(f, 1):
            break
        first = item * at(f, 8)
        _item(f, first, min(at(f, 5), first + at(f, 8)), room, words, scales, sums)


def scratch_bytes(channels: int, count: int, per: int, chunk: int, group: int) -> int:
    """Scratch of a thread: integers, factors and sums of the vectors; results and grid of a row."""
    chunks, groups = channels // chunk, channels // group
    vectors = 2 * count * per * channels + 4 * count * per * chunks + 4 * count * groups
    return vectors + 4 * max(chunk, 8 + 2 * groups)


@jit.built_once
def entry() -> Any:
    """The products, for the pool."""
    stamp = jit.stamp()

    @cfunc(ENTRY, cache=True)
    def run(pointer: Any) -> None:
        if stamp:
            _work(jit.address_of(pointer))

    return run
