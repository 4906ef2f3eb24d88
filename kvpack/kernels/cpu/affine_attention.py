"""Attention over affine codes of keys and values in one loop: no score leaves the first-level cache.

An item is a stretch of tokens of one head. A tile of its keys is decoded and multiplied with the
head's queries, the scores become weights by an online softmax, the tile's values are decoded and
summed up with them. Stretches of a head are joined by their maxima and sums of weights.

Source of the recurrence: Milakov and Gimelshein, arXiv 1805.02867; over tiles: FlashAttention,
arXiv 2205.14135, algorithm 1; stretches side by side: Flash-Decoding (Dao et al., 2023).

Numbers of a frame: 0 to 30 as `affine_rows` has them, of the keys, with 24 the queries float32
[o, M, D] and 25 the weighted values float32 [part, o, M, D]; and

    31 address of a frame whose numbers 5 to 30 are those of the values, 32 the first token,
    33 maxima and 34 sums of weights, float32 [part, o, M], 35 mask float32 [B, T] or 0
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc

from kvpack.kernels.cpu import exponentials, jit
from kvpack.kernels.cpu.affine_rows import decode_tile
from kvpack.kernels.cpu.jit import ENTRY, at, device
from kvpack.kernels.cpu.tiles import TILE, products, sums


@device
def _weigh(f: Any, mask: Any, count: Any, scores: Any, maxima: Any, weights: Any, total: Any) -> Any:
    """Turn the scores [M, TILE] of a tile into weights; bring what was summed up to the new maxima.

    Maxima and sums of weights [M] are a thread's own: side by side in the output, those of several
    heads would share cache lines, which threads would take from each other.
    """
    queries, channels = at(f, 8), at(f, 7)
    for m in range(queries):
        row, held = scores + 4 * TILE * m, weights + 4 * m
        highest = jit.read_float(maxima + 4 * m)
        before = highest
        for i in range(count):
            score = jit.read_float(row + 4 * i)
            if mask:
                score += jit.read_float(mask + 4 * i)
                jit.write_float(row + 4 * i, score)
            highest = max(highest, score)
        for i in range(count, TILE):
            jit.write_float(row + 4 * i, np.float32(-np.inf))
        # A row that has read nothing yet has no maximum to subtract.
        shift = np.float32(0) if highest == np.float32(-np.inf) else highest
        found = exponentials.exponentials(row, TILE, shift)
        if highest > before:
            decay = exponentials.exponential(before - shift)
            jit.write_float(maxima + 4 * m, highest)
            jit.write_float(held, jit.read_float(held) * decay)
            for j in range(channels):
                target = total + 4 * (m * channels + j)
                jit.write_float(target, jit.read_float(target) * decay)
        jit.write_float(held, jit.read_float(held) + found)


@device
def _work(f: Any) -> Any:
    """Take items until none is left."""
    channels, queries, parts, each = at(f, 7), at(f, 8), at(f, 10), at(f, 9)
    rows = at(f, 3) + jit.add_to(f + 16, 1) * at(f, 4)
    step = rows + 4 * TILE * channels
    offset = step + 4 * TILE * channels
    scores, outer = offset + 4 * TILE * channels, at(f, 1) // parts
    maxima = scores + 4 * TILE * queries
    weights = maxima + 4 * queries
    while True:
        item = jit.add_to(f, 1)
        if item >= at(f, 1):
            break
        o, part = item // parts, item % parts
        b, k = o // at(f, 5), o % at(f, 5)
        index = part * outer + o
        total, query = at(f, 25) + 4 * index * queries * channels, at(f, 24) + 4 * o * queries * channels
        jit.fill(total, queries * channels, 0.0)
        jit.fill(maxima, queries, -np.inf)
        jit.fill(weights, queries, 0.0)
        last = min(at(f, 6), (part + 1) * each)
        for start in range(part * each, last, TILE):
            count = min(TILE, last - start)
            decode_tile(f, b, k, at(f, 32) + start, count, rows, step, offset)
            products(rows, 4 * channels, count, channels, query, queries, scores, 4 * TILE)
            mask = at(f, 35) + 4 * (b * at(f, 6) + start) if at(f, 35) else 0
            _weigh(f, mask, count, scores, maxima, weights, total)
            decode_tile(at(f, 31), b, k, at(f, 32) + start, count, rows, step, offset)
            sums(rows, 4 * channels, count, channels, scores, queries, total, 4 * TILE)
        for m in range(queries):
            place = 4 * (index * queries + m)
            jit.write_float(at(f, 33) + place, jit.read_float(maxima + 4 * m))
            jit.write_float(at(f, 34) + place, jit.read_float(weights + 4 * m))


def compiled() -> Any:
    """The loop as a C function; numba keeps it where `objects` does not."""
    stamp = jit.stamp()

    @cfunc(ENTRY, cache=jit.KEPT_BY_NUMBA)
    def run(pointer: Any) -> None:
        if stamp:
            _work(jit.address_of(pointer))

    return run
