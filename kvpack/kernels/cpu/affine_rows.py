"""Rows of affine codes, decoded a few at a time in the first-level cache and used at once.

Numbers of a frame (addresses, sizes; strides in bytes; outer index o = b*K + k):

     0 counter, 1 items, 2 threads that have begun, 3 scratch, 4 scratch bytes of a thread,
     5 K, 6 T, 7 D, 8 M, 9 tokens per item, 10 items per o,
    11 codes, 12 stride of b, 13 stride of k, 14 stride of a row,
    15 to 18 the same of the scale, 19 to 22 of the zero,
    23 channels or tokens per group, 24 input, 25 output,
    26 what to do, 27 axis of the groups, 28 width of a code, 29 how steps are stored,
    30 how zeros are, 31 how the output is stored (of decoded rows; else float32).

A tile of up to `TILE` rows is decoded to float32 and multiplied with all M queries or weights of
its head before the next one is read: numbers that are not codes never reach memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc

from kvpack.kernels.cpu import decoders, jit
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.frames import CENTRED as CENTRED
from kvpack.kernels.cpu.frames import CENTRED_INTEGER as CENTRED_INTEGER
from kvpack.kernels.cpu.frames import CHANNEL as CHANNEL
from kvpack.kernels.cpu.frames import DENSE as DENSE
from kvpack.kernels.cpu.frames import MIX as MIX
from kvpack.kernels.cpu.frames import OFFSET as OFFSET
from kvpack.kernels.cpu.frames import SCORES as SCORES
from kvpack.kernels.cpu.frames import TOKEN as TOKEN
from kvpack.kernels.cpu.jit import ENTRY, at, device
from kvpack.kernels.cpu.tiles import TILE, products, sums


@device
def code_at(row: Any, j: Any, channels: Any, bits: Any) -> Any:
    """One code of a row."""
    first = j * bits // 8
    word = jit.read_byte(row + first)
    if first + 1 < (channels * bits + 7) // 8:
        word |= jit.read_byte(row + first + 1) << 8
    return np.float32((word >> (j * bits % 8)) & ((1 << bits) - 1))


@device
def number_of(code: Any, step: Any, offset: Any, zeros: Any) -> Any:
    """What a code stands for."""
    return code * step + offset if zeros == OFFSET else (code - offset) * step


@device
def _read_grid(f: Any, b: Any, k: Any, entry: Any, count: Any, step: Any, offset: Any) -> Any:
    """`count` entries of the grid from row `entry` on."""
    scales, zeros, half = at(f, 29), at(f, 30), np.float32(1 << (at(f, 28) - 1))
    jit.widen(at(f, 15) + b * at(f, 16) + k * at(f, 17) + entry * at(f, 18), scales, count, step)
    zero = at(f, 19) + b * at(f, 20) + k * at(f, 21) + entry * at(f, 22)
    if zeros == OFFSET:
        # Beside a float8 step the zero is float16.
        jit.widen(zero, jit.FLOAT16 if scales == jit.FLOAT8 else scales, count, offset)
    elif zeros == CENTRED_INTEGER:
        for i in range(count):
            jit.write_float(offset + 4 * i, jit.read_int8(zero + i) + half)
    else:
        jit.fill(offset, count, half)


@device
def by_token_group(f: Any, b: Any, k: Any, start: Any, count: Any, rows: Any, step: Any, offset: Any) -> Any:
    """Rows whose groups are tokens: channels have steps of their own."""
    channels, bits, zeros, group, stride = at(f, 7), at(f, 28), at(f, 30), at(f, 23), at(f, 14)
    whole, centred = channels // LANES * LANES, 0 if zeros == OFFSET else 1
    first = at(f, 11) + b * at(f, 12) + k * at(f, 13)
    done = 0
    while done < count:
        entry = (start + done) // group
        together = min(count - done, (entry + 1) * group - start - done)
        source, row = first + (start + done) * stride, rows + 4 * done * channels
        _read_grid(f, b, k, entry, channels, step, offset)
        if whole == channels:
            decoders.decode_rows_each(source, stride, row, step, offset, channels, together, bits, centred)
        else:
            for i in range(together):
                place, target = source + i * stride, row + 4 * i * channels
                if whole:
                    decoders.decode_each(
                        place, target, step, offset, whole, bits, 0 if zeros == OFFSET else 1
                    )
                for j in range(whole, channels):
                    pair = jit.read_float(step + 4 * j), jit.read_float(offset + 4 * j)
                    jit.write_float(
                        target + 4 * j, number_of(code_at(place, j, channels, bits), *pair, zeros)
                    )
        done += together


@device
def by_channel_group(
    f: Any, b: Any, k: Any, start: Any, count: Any, rows: Any, step: Any, offset: Any
) -> Any:
    """Rows whose groups are neighbouring channels."""
    channels, bits, zeros, group, stride = at(f, 7), at(f, 28), at(f, 30), at(f, 23), at(f, 14)
    groups, centred = (channels + group - 1) // group, 0 if zeros == OFFSET else 1
    first = at(f, 11) + b * at(f, 12) + k * at(f, 13) + start * stride
    _read_grid(f, b, k, start, count * groups, step, offset)
    if group % LANES == 0 and groups * group == channels:
        decoders.decode_rows_grouped(first, stride, rows, step, offset, group, groups, count, bits, centred)
        return
    for i in range(count):
        source, row = first + i * stride, rows + 4 * i * channels
        for g in range(groups):
            place = 4 * (i * groups + g)
            pair = jit.read_float(step + place), jit.read_float(offset + place)
            begin, end = g * group, min(channels, (g + 1) * group)
            whole = begin if group % LANES else begin + (end - begin) // LANES * LANES
            if whole > begin:
                codes = source + begin * bits // 8
                decoders.decode_same(codes, row + 4 * begin, pair[0], pair[1], whole - begin, bits, centred)
            for j in range(whole, end):
                jit.write_float(row + 4 * j, number_of(code_at(source, j, channels, bits), *pair, zeros))


@device
def decode_tile(f: Any, b: Any, k: Any, start: Any, count: Any, rows: Any, step: Any, offset: Any) -> Any:
    """Decode `count` rows of a head from row `start` on to `rows`; `step` and `offset` are scratch."""
    if at(f, 27) == TOKEN:
        by_token_group(f, b, k, start, count, rows, step, offset)
    else:
        by_channel_group(f, b, k, start, count, rows, step, offset)


@device
def _work(f: Any) -> Any:
    """Take items until none is left."""
    tokens, channels, queries, parts = at(f, 6), at(f, 7), at(f, 8), at(f, 10)
    rows = at(f, 3) + jit.add_to(f + 16, 1) * at(f, 4)
    step = rows + 4 * TILE * channels
    offset = step + 4 * TILE * channels
    outer = at(f, 1) // parts
    while True:
        item = jit.add_to(f, 1)
        if item >= at(f, 1):
            break
        o, part = item // parts, item % parts
        b, k = o // at(f, 5), o % at(f, 5)
        last = min(tokens, (part + 1) * at(f, 9))
        total = at(f, 25) + 4 * (part * outer + o) * queries * channels
        if at(f, 26) == MIX:
            jit.fill(total, queries * channels, 0.0)
        for start in range(part * at(f, 9), last, TILE):
            count = min(TILE, last - start)
            decode_tile(f, b, k, start, count, rows, step, offset)
            row = 4 * (o * queries * tokens + start)
            if at(f, 26) == SCORES:
                query = at(f, 24) + 4 * o * queries * channels
                products(rows, 4 * channels, count, channels, query, queries, at(f, 25) + row, 4 * tokens)
            elif at(f, 26) == MIX:
                sums(rows, 4 * channels, count, channels, at(f, 24) + row, queries, total, 4 * tokens)
            else:
                size = 4 if at(f, 31) == jit.FLOAT32 else 2
                place = at(f, 25) + size * (o * tokens + start) * channels
                jit.narrow(rows, count * channels, place, at(f, 31))


def compiled() -> Any:
    """The loop as a C function; numba keeps it where `objects` does not."""
    stamp = jit.stamp()

    @cfunc(ENTRY, cache=jit.KEPT_BY_NUMBA)
    def run(pointer: Any) -> None:
        if stamp:
            _work(jit.address_of(pointer))

    return run
