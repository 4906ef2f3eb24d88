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

from typing import Any

import numpy as np
from numba import cfunc

from kvpack.kernels.cpu import integer_vectors, jit, vectors
from kvpack.kernels.cpu.affine_rows import CENTRED_INTEGER, OFFSET
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.jit import ENTRY, at, device


@device
def _zero_term(zeros: Any, zero: Any, half: Any, steps: Any, lows: Any, sums: Any, groups: Any) -> Any:
    """What codes of 0 stand for, times the sums of the vector: the part of a product without codes."""
    if zeros == OFFSET:
        return vectors.product(lows, sums, groups)
    total = half * vectors.product(steps, sums, groups)
    if zeros == CENTRED_INTEGER:
        whole = groups // LANES * LANES
        if whole:
            total += integer_vectors.sixteen_zeros(zero, steps, sums, whole)
        for g in range(whole, groups):
            total += jit.read_int8(zero + g) * jit.read_float(steps + 4 * g) * jit.read_float(sums + 4 * g)
    return -total


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
            integer_vectors.write_word(out + 2 * j, _whole(jit.read_float(numbers + 4 * j)))
        return
    for first in range(0, chunk, fields * LANES):
        for field in range(fields):
            target, place = out + 2 * (first + field * LANES), numbers + 4 * (first + field)
            for lane in range(LANES):
                integer_vectors.write_word(
                    target + 2 * lane, _whole(jit.read_float(place + 4 * lane * fields))
                )


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
            integer_vectors.row(
                source, x, channels, steps, line, groups, each, chunk, found, version + together
            )
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


def compiled() -> Any:
    """The loop as a C function; numba keeps it where `objects` does not."""
    stamp = jit.stamp()

    @cfunc(ENTRY, cache=jit.KEPT_BY_NUMBA)
    def run(pointer: Any) -> None:
        if stamp:
            _work(jit.address_of(pointer))

    return run
