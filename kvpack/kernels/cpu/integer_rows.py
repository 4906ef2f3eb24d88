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
    [n, C], 22 integers per number (1 or 2; with 2 the output is float32), 23 output [n, R],
    24 `frames.integer_key`, 25 chunks, 26 groups, 27 groups that scratch has room for, 28 chunks per
    group, 29 bytes of a row's steps, 30 of its zeros, 31 how zeros that are no integers are stored,
    32 how the vectors are, 33 how the output is
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc

from kvpack.kernels.cpu import integer_grids, integer_vectors, jit, vectors
from kvpack.kernels.cpu.frames import GROUPS, MOST_CHANNELS, TOGETHER
from kvpack.kernels.cpu.jit import ENTRY, at, device

_TOGETHER = TOGETHER[-1]
_SUMS = integer_vectors.SUMS


@device
def _round_vectors(f: Any, integers: Any, factors: Any, sums: Any, numbers: Any) -> Any:
    """Integers [n * per, C], factors [n * per, chunks] and sums [n * per, groups] of the vectors.

    The sums of what was left over are 0: the whole sum is the first integers'.
    """
    channels, count, chunk, per = at(f, 6), at(f, 7), at(f, 16), at(f, 22)
    chunks, groups, each = at(f, 25), at(f, 27), at(f, 28)
    kind, found = at(f, 32), numbers + 4 * MOST_CHANNELS
    size = 4 if kind == jit.FLOAT32 else 2
    jit.fill(sums, count * per * groups, 0.0)
    for n in range(count):
        source = at(f, 21) + size * n * channels
        line, target = factors + 4 * n * per * chunks, integers + 2 * n * per * channels
        for c in range(chunks):
            jit.widen(source + size * c * chunk, kind, chunk, numbers)
            vectors.peak_and_sum(numbers, chunk, found)
            # A chunk of zeros has a factor, too.
            factor = max(jit.read_float(found), np.float32(1e-30)) / np.float32(32767)
            place = sums + 4 * (n * per * groups + c // each)
            jit.write_float(place, jit.read_float(place) + jit.read_float(found + 4))
            jit.write_float(line + 4 * c, factor)
            out, rest = target + 2 * c * chunk, 0
            if per == 2:
                jit.write_float(line + 4 * (chunks + c), factor / np.float32(32767))
                rest = out + 2 * channels
            integer_grids.round_chunk(numbers, chunk, np.float32(1) / factor, at(f, 20), out, rest)


@device
def _copied(source: Any, size: Any, room: Any) -> Any:
    """Where a copy of `size` bytes is, for a row whose numbers cannot be read eight at a time."""
    for place in range(size):
        jit.write_byte(room + place, jit.read_byte(source + place))
    return room


@device
def _weigh(f: Any, r: Any, count: Any, scales: Any, sums: Any, room: Any, weights: Any, start: Any) -> Any:
    """What row `r` multiplies the chunks of `count` integer vectors with, and the parts without codes."""
    scale, zero = at(f, 11) + r * at(f, 12), at(f, 13) + r * at(f, 14)
    chunks, groups = at(f, 25), at(f, 27)
    if groups != at(f, 26):
        scale = _copied(scale, at(f, 29), room + 4 * groups)
        zero = _copied(zero, at(f, 30), room + 8 * groups)
    half = np.float32(1 << (at(f, 17) - 1))
    kind, zero_kind, zeros = at(f, 18), at(f, 31), at(f, 19)
    # fmt: off
    integer_grids.weigh(
        scale, kind, zero, zero_kind, zeros, half, groups, count, scales, chunks, sums, room, weights, start
    )
    # fmt: on
    each = at(f, 28)
    if each == 1:
        return
    for n in range(count):
        line, out = scales + 4 * n * chunks, weights + 4 * n * (chunks + GROUPS)
        for c in range(chunks):
            step = jit.read_float(room + 4 * (c // each))
            jit.write_float(out + 4 * c, step * jit.read_float(line + 4 * c))


@device
def _multiply(f: Any, r: Any, begin: Any, together: Any, x: Any, room: Any) -> Any:
    """Products of row `r` with weighed vectors, to the output."""
    rows, per, chunks, kind = at(f, 5), at(f, 22), at(f, 25), at(f, 33)
    starts, codes = room + 4 * _TOGETHER, at(f, 9) + r * at(f, 10)
    weights, key = starts + 4 * _TOGETHER * _SUMS, integer_vectors.version(at(f, 24), together)
    integer_vectors.row(codes, x, at(f, 6), weights, starts, chunks + GROUPS, chunks, at(f, 16), room, key)
    for n in range(begin, begin + together):
        index, total = (n >> (per - 1)) * rows + r, jit.read_float(room + 4 * (n - begin))
        # What the first integers left over is added to their product.
        if n & (per - 1):
            total += jit.read_float(at(f, 23) + 4 * index)
        jit.write(at(f, 23), kind, index, total)


@device
def _item(f: Any, first: Any, last: Any, room: Any, words: Any, scales: Any, sums: Any) -> Any:
    """Rows `first` to `last` with the vectors' integers, factors and sums; `room` is scratch."""
    integers, chunks, groups = at(f, 7) * at(f, 22), at(f, 25), at(f, 27)
    starts, line = room + 4 * _TOGETHER, chunks + GROUPS
    weights = starts + 4 * _TOGETHER * _SUMS
    grid = weights + 4 * _TOGETHER * line
    for r in range(first, last):
        begin = 0
        while begin < integers:
            together = 4 if integers - begin >= 4 else 2 if integers - begin >= 2 else 1
            x = words + 2 * begin * at(f, 6)
            own, share = scales + 4 * begin * chunks, sums + 4 * begin * groups
            _weigh(f, r, together, own, share, grid, weights, starts)
            _multiply(f, r, begin, together, x, room)
            begin += together


@device
def _work(f: Any) -> Any:
    """Take items of rows until none is left."""
    channels, integers, chunks, groups = at(f, 6), at(f, 7) * at(f, 22), at(f, 25), at(f, 27)
    words = at(f, 3) + jit.add_to(f + 16, 1) * at(f, 4)
    scales = words + 2 * integers * channels
    sums = scales + 4 * (integers * chunks + GROUPS)
    room = sums + 4 * integers * groups
    _round_vectors(f, words, scales, sums, room)
    # What a copied grid is padded with.
    jit.fill(room + 4 * _TOGETHER * (1 + _SUMS + chunks + GROUPS), 3 * groups, 0.0)
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
