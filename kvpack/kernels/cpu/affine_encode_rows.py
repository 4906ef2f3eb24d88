"""Passes over numbers in the dtype they are stored in: ranges, affine codes, what codes lose.

Numbers of a frame (addresses, sizes; strides in bytes; outer index o = b*K + k):

     0 counter, 1 items, 2 threads that have begun, 3 scratch, 4 scratch bytes of a thread,
     5 K, 6 T, 7 D, 8 numbers, 9 stride of b, 10 stride of k, 11 stride of a row, 12 how they are stored,
    13 what to do, 14 axis of the groups, 15 channels or tokens per group, 16 units, 17 units per item,
    18 and 19 what is read or written beside codes (see below), 20 codes, 21 width of a code,
    22 how steps are stored, 23 how zeros are, 24 sums.

A unit is a row, or a group of tokens; all that is read and written beside numbers lies in their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc

from kvpack.kernels.cpu import decoders, encode_vectors, grid_vectors, jit
from kvpack.kernels.cpu.affine_rows import CENTRED, CENTRED_INTEGER, OFFSET, TOKEN, code_at, number_of
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.frames import CODES, ENCODE, RANGES, SQUARES
from kvpack.kernels.cpu.jit import ENTRY, at, device


@device
def _size(kind: Any) -> Any:
    return 4 if kind == jit.FLOAT32 else 2


@device
def _row(f: Any, row: Any) -> Any:
    """Where a row begins that is counted over all outer indices."""
    o, t = row // at(f, 6), row % at(f, 6)
    return at(f, 8) + o // at(f, 5) * at(f, 9) + o % at(f, 5) * at(f, 10) + t * at(f, 11)


@device
def _extend(low: Any, high: Any, x: Any) -> Any:
    """Widen a range, held at two addresses, by a number; NaN stays."""
    nan = np.isnan(x)
    if nan or x < jit.read_float(low):
        jit.write_float(low, x)
    if nan or x > jit.read_float(high):
        jit.write_float(high, x)


@device
def _range_of_channels(f: Any, unit: Any, low: Any, high: Any) -> Any:
    channels, kind, group = at(f, 7), at(f, 12), at(f, 15)
    row, begin = _row(f, unit), 0
    while begin < channels:
        end = min(channels, begin + group)
        whole = begin + (end - begin) // LANES * LANES
        if whole > begin:
            first = row + _size(kind) * begin
            encode_vectors.range_same(first, kind, whole - begin, low, high)
        else:
            jit.fill(low, 1, np.inf)
            jit.fill(high, 1, -np.inf)
        for j in range(whole, end):
            _extend(low, high, jit.read(row, kind, j))
        low, high, begin = low + 4, high + 4, end


@device
def _range_of_tokens(f: Any, unit: Any, low: Any, high: Any) -> Any:
    channels, kind, size, stride = at(f, 7), at(f, 12), at(f, 15), at(f, 11)
    whole, row = channels // LANES * LANES, _row(f, unit * size)
    if whole:
        encode_vectors.range_each(row, kind, stride, size, whole, low, high)
    jit.fill(low + 4 * whole, channels - whole, np.inf)
    jit.fill(high + 4 * whole, channels - whole, -np.inf)
    for j in range(whole, channels):
        for i in range(size):
            _extend(low + 4 * j, high + 4 * j, jit.read(row + i * stride, kind, j))


@device
def _range(f: Any, unit: Any, low: Any, high: Any) -> Any:
    if at(f, 14) == TOKEN:
        _range_of_tokens(f, unit, low, high)
    else:
        _range_of_channels(f, unit, low, high)


@device
def _entries(f: Any) -> Any:
    """Groups of a unit."""
    return at(f, 7) if at(f, 14) == TOKEN else (at(f, 7) + at(f, 15) - 1) // at(f, 15)


@device
def _zero_kind(f: Any) -> Any:
    """How the zeros of a grid are stored: beside a float8 step they are float16."""
    if at(f, 23) == CENTRED_INTEGER:
        return jit.INT8
    return jit.FLOAT16 if at(f, 22) == jit.FLOAT8 else at(f, 22)


@device
def _size_of_grid(kind: Any) -> Any:
    return 1 if kind >= jit.FLOAT8 else _size(kind)


@device
def _read_grid(f: Any, unit: Any, step: Any, offset: Any) -> Any:
    """Steps and offsets of a unit."""
    scales, zeros, count, half = at(f, 22), _zero_kind(f), _entries(f), np.float32(1 << (at(f, 21) - 1))
    first = unit * count
    jit.widen(at(f, 18) + _size_of_grid(scales) * first, scales, count, step)
    if at(f, 23) == CENTRED:
        jit.fill(offset, count, half)
        return
    jit.widen(at(f, 19) + _size_of_grid(zeros) * first, zeros, count, offset)
    if at(f, 23) == CENTRED_INTEGER:
        for place in range(offset, offset + 4 * count, 4):
            jit.write_float(place, jit.read_float(place) + half)


@device
def _copy(source: Any, target: Any, count: Any) -> Any:
    for i in range(count):
        encode_vectors.write_byte(target + i, jit.read_byte(source + i))


@device
def _fit_grid(f: Any, unit: Any, step: Any, offset: Any, stored: Any) -> Any:
    """Steps and offsets of a unit by its ranges; `stored` is scratch for four times the channels."""
    scales, zeros, count, bits = at(f, 22), _zero_kind(f), _entries(f), at(f, 21)
    width = 4 * ((at(f, 7) + LANES - 1) // LANES * LANES)
    low, high = stored + 2 * width, stored + 3 * width
    _range(f, unit, low, high)
    top, half = np.float32((1 << bits) - 1), np.float32(1 << (bits - 1))
    grid_vectors.fit(low, high, step, offset, stored, stored + width, count, top, half, scales, at(f, 23))
    first, size = unit * count, _size_of_grid(scales)
    _copy(stored, at(f, 18) + size * first, size * count)
    if at(f, 23) != CENTRED:
        size = _size_of_grid(zeros)
        _copy(stored + width, at(f, 19) + size * first, size * count)


@device
def _round(x: Any, step: Any, offset: Any, top: Any, centred: Any) -> Any:
    """The nearest code, with the roundings of `kvpack.ops.affine.codes`."""
    nearest = np.rint(x / step) + offset if centred else np.rint((x - offset) / step)
    return np.int64(0) if np.isnan(nearest) else np.int64(min(max(nearest, np.float32(0)), top))


@device
def _pack(codes: Any, channels: Any, bits: Any, out: Any) -> Any:
    """The bit stream of a row, the last byte filled up with zeros."""
    wide, whole = channels // 32 * 32, channels // 16 * 16
    if wide:
        encode_vectors.pack_32(codes, out, wide, bits)
    if whole > wide:
        encode_vectors.pack_16(codes + wide, out + wide * bits // 8, whole - wide, bits)
    place, word, held = out + whole * bits // 8, np.int64(0), np.int64(0)
    for j in range(whole, channels):
        word |= jit.read_byte(codes + j) << held
        held += bits
        if held >= 8:
            encode_vectors.write_byte(place, word)
            place, word, held = place + 1, word >> 8, held - 8
    if held:
        encode_vectors.write_byte(place, word)


@device
def _codes(f: Any, unit: Any, step: Any, offset: Any, codes: Any) -> Any:
    """The codes of a unit whose steps and offsets are known."""
    channels, kind, bits = at(f, 7), at(f, 12), at(f, 21)
    centred, top = np.int64(at(f, 23) != OFFSET), np.float32((1 << bits) - 1)
    token, size = at(f, 14) == TOKEN, at(f, 15)
    group, rows = (channels, size) if token else (size, 1)
    for i in range(unit * rows, (unit + 1) * rows):
        row, begin, g = _row(f, i), 0, 0
        while begin < channels:
            end = min(channels, begin + group)
            whole, first = begin + (end - begin) // LANES * LANES, row + _size(kind) * begin
            if whole > begin and token:
                encode_vectors.round_each(first, kind, codes, whole, step, offset, top, centred)
            elif whole > begin:
                s, o = jit.read_float(step + g), jit.read_float(offset + g)
                encode_vectors.round_same(first, kind, codes + begin, whole - begin, s, o, top, centred)
            for j in range(whole, end):
                place = 4 * j if token else g
                s, o = jit.read_float(step + place), jit.read_float(offset + place)
                encode_vectors.write_byte(codes + j, _round(jit.read(row, kind, j), s, o, top, centred))
            begin, g = end, g + 4
        _pack(codes, channels, bits, at(f, 20) + i * ((channels * bits + 7) // 8))


@device
def _decode(f: Any, source: Any, step: Any, offset: Any, out: Any) -> Any:
    """The numbers of a row of codes, float32."""
    channels, bits, zeros = at(f, 7), at(f, 21), at(f, 23)
    centred, token = np.int64(zeros != OFFSET), at(f, 14) == TOKEN
    group = channels if token else at(f, 15)
    begin, g = 0, 0
    while begin < channels:
        end = min(channels, begin + group)
        # Vectors of codes begin with a byte.
        whole = begin if group % LANES and g else begin + (end - begin) // LANES * LANES
        first, place = source + begin * bits // 8, out + 4 * begin
        if whole > begin and token:
            decoders.decode_each(first, place, step, offset, whole, bits, centred)
        elif whole > begin:
            s, o = jit.read_float(step + g), jit.read_float(offset + g)
            decoders.decode_same(first, place, s, o, whole - begin, bits, centred)
        for j in range(whole, end):
            entry = 4 * j if token else g
            s, o = jit.read_float(step + entry), jit.read_float(offset + entry)
            jit.write_float(out + 4 * j, number_of(code_at(source, j, channels, bits), s, o, zeros))
        begin, g = end, g + 4


@device
def _squares(f: Any, i: Any, other: Any) -> Any:
    """Sums of squares over row `i`: of what the float32 numbers `other` differ, and of its own."""
    channels, kind = at(f, 7), at(f, 12)
    whole = channels // LANES * LANES
    row, out = _row(f, i), at(f, 24) + 8 * i
    jit.fill(out, 2, 0.0)
    if whole:
        encode_vectors.squares(row, kind, other, whole, out)
    for j in range(whole, channels):
        own = jit.read(row, kind, j)
        lost = own - jit.read_float(other + 4 * j)
        jit.write_float(out, jit.read_float(out) + lost * lost)
        jit.write_float(out + 4, jit.read_float(out + 4) + own * own)


@device
def _lost(f: Any, unit: Any, step: Any, offset: Any, decoded: Any) -> Any:
    rows = at(f, 15) if at(f, 14) == TOKEN else 1
    for i in range(unit * rows, (unit + 1) * rows):
        source = at(f, 20) + i * ((at(f, 7) * at(f, 21) + 7) // 8)
        _decode(f, source, step, offset, decoded)
        _squares(f, i, decoded)


@device
def _work(f: Any) -> Any:
    """Take items until none is left."""
    width = 4 * ((at(f, 7) + LANES - 1) // LANES * LANES)
    step = at(f, 3) + jit.add_to(f + 16, 1) * at(f, 4)
    offset, stored, codes = step + width, step + 2 * width, step + 6 * width
    while True:
        item = jit.add_to(f, 1)
        if item >= at(f, 1):
            break
        for unit in range(item * at(f, 17), min(at(f, 16), (item + 1) * at(f, 17))):
            if at(f, 13) == SQUARES:
                _squares(f, unit, at(f, 18) + 4 * unit * at(f, 7))
            elif at(f, 13) == RANGES:
                place = 4 * unit * _entries(f)
                _range(f, unit, at(f, 18) + place, at(f, 19) + place)
            elif at(f, 13) == ENCODE:
                _fit_grid(f, unit, step, offset, stored)
                _codes(f, unit, step, offset, codes)
            else:
                _read_grid(f, unit, step, offset)
                if at(f, 13) == CODES:
                    _codes(f, unit, step, offset, codes)
                else:
                    _lost(f, unit, step, offset, stored)


def compiled() -> Any:
    """The loop as a C function; numba keeps it where `objects` does not."""
    stamp = jit.stamp()

    @cfunc(ENTRY, cache=jit.KEPT_BY_NUMBA)
    def run(pointer: Any) -> None:
        if stamp:
            _work(jit.address_of(pointer))

    return run
