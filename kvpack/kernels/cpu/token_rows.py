"""Encoded tokens, brought back to the model's basis a few rows at a time and used at once.

Numbers of a frame: 0 to 30 as `affine_rows` has them (o = b*K' + k, D is a row's C channels; codes may
be numbers of the kind in 29), and

    31 rows of a tile, 32 heads side by side in a row, 33 table of levels,
    34 outliers per row (0: none), 35 address of their numbers, strides 36 of b, 37 of k, 38 of a row,
    39 how they are stored, 40 to 43 the same of their places, 44 bytes of a place,
    45 order of the channels (0: as they are), 46 length of the Hadamard transform (0: none),
    47 own and 48 other factors of a turn (0: none), 49 numbers from one b to the next,
    50 the partner of each of a head's channels, 51 its place in front of 16 neighbours, -1 if they are not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cfunc

from kvpack.kernels.cpu import jit, row_vectors
from kvpack.kernels.cpu.affine_rows import (
    CHANNEL,
    MIX,
    SCORES,
    TOKEN,
    by_channel_group,
    by_token_group,
)
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.jit import ENTRY, at, device
from kvpack.kernels.cpu.tiles import products, sums

LEVELS, LEVELS_BY_TOKEN, NUMBERS = range(2, 5)
"""Sources beside `CHANNEL` and `TOKEN` groups of affine codes: levels with a range per channel, or per
token; numbers as they are."""


def scratch_bytes(rows: int, channels: int) -> int:
    """Scratch of a thread: two tiles of numbers, steps and offsets."""
    return 4 * 4 * rows * channels


@device
def _source(f: Any, b: Any, k: Any, row: Any, base: Any) -> Any:
    """Where a row of the tensor starts whose place is in the frame from `base` on."""
    return at(f, base) + b * at(f, base + 1) + k * at(f, base + 2) + row * at(f, base + 3)


@device
def _decode_others(f: Any, b: Any, k: Any, start: Any, count: Any, rows: Any, step: Any, offset: Any) -> Any:
    """Rows of levels, or of numbers as they are."""
    channels, kind, stored = at(f, 7), at(f, 27), at(f, 29)
    for i in range(count):
        row, source = rows + 4 * i * channels, _source(f, b, k, start + i, 11)
        if kind == NUMBERS:
            row_vectors.widen_row(source, row, channels, stored)
        else:
            row_vectors.look_up(source, row, at(f, 33), channels, at(f, 28))
            each = kind == LEVELS
            if i == 0 or not each:
                entries = channels if each else 1
                jit.widen(_source(f, b, k, start + i, 15), stored, entries, step)
                jit.widen(_source(f, b, k, start + i, 19), stored, entries, offset)
            row_vectors.stretch(row, step, offset, channels, 4 if each else 0)


@device
def _put_outliers(f: Any, b: Any, k: Any, start: Any, count: Any, rows: Any) -> Any:
    channels, size = at(f, 7), at(f, 44)
    for i in range(count):
        numbers, places = _source(f, b, k, start + i, 35), _source(f, b, k, start + i, 40)
        row = rows + 4 * i * channels
        for j in range(at(f, 34)):
            place = jit.read_byte(places + j * size)
            for byte in range(1, size):
                place |= jit.read_byte(places + j * size + byte) << (8 * byte)
            jit.write_float(row + 4 * place, jit.read(numbers, at(f, 39), j))


@device
def _put_in_order(f: Any, count: Any, rows: Any, out: Any) -> Any:
    channels, order = at(f, 7), at(f, 45)
    for i in range(count):
        row, target = rows + 4 * i * channels, out + 4 * i * channels
        for j in range(channels):
            jit.write_float(target + 4 * j, jit.read_float(row + 4 * at(order, j)))


@device
def _spread(f: Any, count: Any, rows: Any) -> Any:
    """Hadamard transforms of neighbours in place, in the order of `kvpack.ops.hadamard`."""
    length, whole = at(f, 46), count * at(f, 7)
    half = length // 2
    while half >= LANES:
        for base in range(0, whole, 2 * half):
            row_vectors.butterfly(rows + 4 * base, rows + 4 * (base + half), half)
        half //= 2
    row_vectors.butterflies_within(rows, whole, np.float32(1 / math.sqrt(length)))


@device
def _turn(f: Any, b: Any, start: Any, count: Any, rows: Any, out: Any) -> Any:
    """Turn every head of every row."""
    heads = at(f, 32)
    width = at(f, 7) // heads
    for i in range(count):
        place = 4 * (b * at(f, 49) + (start + i) * width)
        own, other = at(f, 47) + place, at(f, 48) + place
        for h in range(heads):
            row, target = rows + 4 * (i * heads + h) * width, out + 4 * (i * heads + h) * width
            for j in range(0, width, LANES):
                first = at(at(f, 51), j // LANES)
                if first >= 0:
                    row_vectors.turned(
                        target + 4 * j, row + 4 * j, row + 4 * first, own + 4 * j, other + 4 * j
                    )
                else:
                    for c in range(j, j + LANES):
                        x = jit.read_float(row + 4 * c) * jit.read_float(own + 4 * c)
                        y = jit.read_float(row + 4 * at(at(f, 50), c)) * jit.read_float(other + 4 * c)
                        jit.write_float(target + 4 * c, x + y)


@device
def _decode(f: Any, b: Any, k: Any, start: Any, count: Any, rows: Any, step: Any, offset: Any) -> Any:
    kind = at(f, 27)
    if kind == TOKEN:
        by_token_group(f, b, k, start, count, rows, step, offset)
    elif kind == CHANNEL:
        by_channel_group(f, b, k, start, count, rows, step, offset)
    else:
        _decode_others(f, b, k, start, count, rows, step, offset)


@device
def _brought_back(f: Any, b: Any, start: Any, count: Any, rows: Any, spare: Any) -> Any:
    """The address of the rows in the model's basis, one of the two tiles."""
    if at(f, 45):
        _put_in_order(f, count, rows, spare)
        rows, spare = spare, rows
    if at(f, 46):
        _spread(f, count, rows)
    if at(f, 47):
        _turn(f, b, start, count, rows, spare)
        rows, spare = spare, rows
    return rows


@device
def _work(f: Any) -> Any:
    """Take items until none is left."""
    tokens, channels, queries, parts, heads = at(f, 6), at(f, 7), at(f, 8), at(f, 10), at(f, 32)
    tile, width = 4 * at(f, 31) * channels, channels // heads
    first = at(f, 3) + jit.add_to(f + 16, 1) * at(f, 4)
    outer = at(f, 1) // parts
    while True:
        item = jit.add_to(f, 1)
        if item >= at(f, 1):
            break
        o, part = item // parts, item % parts
        b, k = o // at(f, 5), o % at(f, 5)
        last = min(tokens, (part + 1) * at(f, 9))
        total = at(f, 25) + 4 * (part * outer + o) * heads * queries * width
        if at(f, 26) == MIX:
            jit.fill(total, heads * queries * width, 0.0)
        for start in range(part * at(f, 9), last, at(f, 31)):
            count = min(at(f, 31), last - start)
            _decode(f, b, k, start, count, first, first + 2 * tile, first + 3 * tile)
            if at(f, 34):
                _put_outliers(f, b, k, start, count, first)
            rows = _brought_back(f, b, start, count, first, first + tile)
            for h in range(heads):
                head, row = (o * heads + h) * queries, rows + 4 * h * width
                line = 4 * (head * tokens + start)
                if at(f, 26) == SCORES:
                    query = at(f, 24) + 4 * head * width
                    products(row, 4 * channels, count, width, query, queries, at(f, 25) + line, 4 * tokens)
                else:
                    target = total + 4 * h * queries * width
                    sums(row, 4 * channels, count, width, at(f, 24) + line, queries, target, 4 * tokens)


def compiled() -> Any:
    """The loop as a C function; numba keeps it where `objects` does not."""
    stamp = jit.stamp()

    @cfunc(ENTRY, cache=jit.KEPT_BY_NUMBA)
    def run(pointer: Any) -> None:
        if stamp:
            _work(jit.address_of(pointer))

    return run
