"""Rows of codes that are looked up, decoded a few at a time in the first-level cache and used at once.

Numbers of a frame beside the pool's five (addresses, sizes; strides in bytes; outer index o):

     5 T, 6 D, 7 M, 8 rows per item, 9 items per o, 10 rows that are decoded together,
    11 codes, 12 stride of o, 13 stride of a row, 14 to 16 the same of the first table, 17 to 19 of the
    second, 20 to 22 of the mask (address 0: none), 23 input, 24 numbers of an input row, 25 output,
    26 what to do (`affine_rows`), 27 kind, 28 width of a code, 29 how the first table is stored,
    30 how even grids have zeros (`affine_rows`), 31 how the output is stored, 32 numbers per group,
    33 stored numbers per row, 34 numbers of a vector, 35 kept, 36 of so many, 37 bits of a pattern,
    38 places of every pattern int16 [P, kept], 39 P, 40 places of pairs of 2:4 patterns

A row's codes become 16-bit words, these become the stored numbers; those of a mask are multiplied
where they lie (2:4), or put between zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc

from kvpack.kernels.cpu import jit, lookups, vectors
from kvpack.kernels.cpu.affine_rows import CENTRED_INTEGER, DENSE, MIX, OFFSET, SCORES, number_of
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.jit import ENTRY, at, device
from kvpack.kernels.cpu.tiles import products, sums

EVEN, MIRRORED, VECTORS = range(3)
"""What codes stand for."""
PRODUCTS = 3
"""What to do beside what `affine_rows` knows: scores of few queries, without decoded rows. Only of vectors
of two, four or eight numbers, and of 2:4 masks; queries of these are filled up with zeros."""
ROOM = 64
"""Numbers that lines of scratch have beyond their own."""


def scratch_bytes(together: int, channels: int, width: int) -> int:
    """Scratch of a thread: decoded rows; lines of numbers, steps, offsets; four lines of words or levels."""
    return 4 * (together * channels + 7 * (max(channels, width) + ROOM))


@device
def _words(row: Any, count: Any, bits: Any, size: Any, out: Any) -> Any:
    """`count` codes of a row of `size` bytes as words; zeros behind them, to a multiple of 64."""
    whole = min(count, 8 * size // bits) // LANES * LANES
    if whole:
        lookups.unpack_row(row, out, whole, bits)
    for j in range(whole, count):
        first = j * bits // 8
        word = jit.read_byte(row + first)
        if first + 1 < size:
            word |= jit.read_byte(row + first + 1) << 8
        jit.write_word(out + 2 * j, (word >> (j * bits % 8)) & ((1 << bits) - 1))
    for j in range(count, (count + 63) // 64 * 64):
        jit.write_word(out + 2 * j, 0)


@device
def _grid(f: Any, o: Any, t: Any, groups: Any, first: Any, second: Any) -> Any:
    """The tables' entries of a row, as float32."""
    kind, zeros, half = at(f, 29), at(f, 30), np.float32(1 << (at(f, 28) - 1))
    jit.widen(at(f, 14) + o * at(f, 15) + t * at(f, 16), kind, groups, first)
    source = at(f, 17) + o * at(f, 18) + t * at(f, 19)
    if at(f, 27) == MIRRORED or (at(f, 27) == EVEN and zeros == OFFSET):
        # Beside a float8 step the zero is float16.
        jit.widen(source, jit.FLOAT16 if kind == jit.FLOAT8 else kind, groups, second)
    elif at(f, 27) == EVEN:
        for g in range(groups):
            centre = half
            if zeros == CENTRED_INTEGER:
                centre += jit.read_int8(source + g)
            jit.write_float(second + 4 * g, centre)


@device
def _four(out: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    jit.write_float(out, a)
    jit.write_float(out + 4, b)
    jit.write_float(out + 8, c)
    jit.write_float(out + 12, d)


@device
def _of_four_levels(f: Any, row: Any, first: Any, second: Any, levels: Any, out: Any) -> Any:
    """Numbers of a row of 2-bit codes: every group has four levels."""
    width, group, groups = at(f, 33), at(f, 32), (at(f, 33) + at(f, 32) - 1) // at(f, 32)
    if at(f, 27) == MIRRORED:
        for g in range(groups):
            a, b = jit.read_float(first + 4 * g), jit.read_float(second + 4 * g)
            _four(levels + 16 * g, -b, -a, a, b)
    elif at(f, 30) == OFFSET:
        for g in range(groups):
            step, low = jit.read_float(first + 4 * g), jit.read_float(second + 4 * g)
            two, three = np.float32(2) * step, np.float32(3) * step
            _four(levels + 16 * g, low, step + low, two + low, three + low)
    else:
        for g in range(groups):
            step, centre = jit.read_float(first + 4 * g), jit.read_float(second + 4 * g)
            one, two, three = np.float32(1) - centre, np.float32(2) - centre, np.float32(3) - centre
            _four(levels + 16 * g, (np.float32(0) - centre) * step, one * step, two * step, three * step)
    # Without whole groups of 16 codes, and in a last group that is shorter, one by one.
    whole = width // group if group % LANES == 0 else 0
    if whole:
        lookups.four_levels(row, out, group, whole, levels)
    for j in range(whole * group, width):
        code = (jit.read_byte(row + j // 4) >> (j % 4 * 2)) & 3
        jit.write_float(out + 4 * j, jit.read_float(levels + 4 * (j // group * 4 + code)))


@device
def _on_a_grid(f: Any, row: Any, first: Any, second: Any, words: Any, out: Any) -> Any:
    """Numbers of a row of codes of any width on even grids."""
    width, group, groups = at(f, 33), at(f, 32), (at(f, 33) + at(f, 32) - 1) // at(f, 32)
    _words(row, width, at(f, 28), (width * at(f, 28) + 7) // 8, words)
    for g in range(groups):
        begin, end = g * group, min(width, (g + 1) * group)
        step, offset = jit.read_float(first + 4 * g), jit.read_float(second + 4 * g)
        whole = begin + (end - begin) // LANES * LANES
        if whole > begin:
            centred = 0 if at(f, 30) == OFFSET else 1
            lookups.on_a_grid(words + 2 * begin, out + 4 * begin, whole - begin, step, offset, centred)
        for j in range(whole, end):
            code = np.float32(np.int32(jit.read_word(words + 2 * j)))
            jit.write_float(out + 4 * j, number_of(code, step, offset, at(f, 30)))


@device
def _places(f: Any, row: Any, count: Any, words: Any, high: Any) -> Any:
    """The places in a codebook that a row of codes of up to 16 bits names."""
    bits = at(f, 28)
    low = min(bits, 8)
    _words(row, count, low, (count * low + 7) // 8, words)
    if bits > 8:
        _words(row + count, count, bits - 8, (count * (bits - 8) + 7) // 8, high)
        for j in range(count):
            word = jit.read_word(words + 2 * j) | (jit.read_word(high + 2 * j) << 8)
            jit.write_word(words + 2 * j, word)


@device
def _of_a_codebook(f: Any, first: Any, words: Any, out: Any) -> Any:
    """Numbers of a row of vectors."""
    size, per = at(f, 34), at(f, 32) // at(f, 34)
    count, copied = at(f, 33) // size, size in lookups.SIZES
    for g in range((count + per - 1) // per):
        scale, book = jit.read_float(first + 4 * g), at(f, 17) + 4 * g * size * (1 << at(f, 28))
        begin, end = g * per, min(count, (g + 1) * per)
        whole = (end - begin) // lookups.TOGETHER * lookups.TOGETHER if copied else 0
        if whole:
            lookups.copy_vectors(words + 2 * begin, book, out + 4 * begin * size, whole, size, scale)
        for j in range(begin + whole, end):
            source, target = book + 4 * size * jit.read_word(words + 2 * j), out + 4 * j * size
            for k in range(size):
                jit.write_float(target + 4 * k, jit.read_float(source + 4 * k) * scale)


@device
def _codebook_scores(f: Any, o: Any, t: Any, first: Any, words: Any) -> Any:
    """Products of a row of vectors with few queries: nothing is copied."""
    size, per = at(f, 34), at(f, 32) // at(f, 34)
    count = at(f, 33) // size
    for m in range(at(f, 7)):
        x, total = at(f, 23) + 4 * (o * at(f, 7) + m) * at(f, 24), np.float32(0)
        for g in range((count + per - 1) // per):
            book, begin = at(f, 17) + 4 * g * size * (1 << at(f, 28)), g * per
            part, end = np.float32(0), min(count, begin + per)
            whole = (end - begin) // lookups.MULTIPLIED * lookups.MULTIPLIED
            if whole:
                source = x + 4 * begin * size
                part = lookups.vectors_product(words + 2 * begin, book, source, whole, size)
            for j in range(begin + whole, end):
                vector = book + 4 * size * jit.read_word(words + 2 * j)
                part += vectors.product(vector, x + 4 * j * size, size)
            total += part * jit.read_float(first + 4 * g)
        jit.write_float(at(f, 25) + 4 * ((o * at(f, 7) + m) * at(f, 5) + t), total)


@device
def _stored(f: Any, o: Any, t: Any, out: Any, lines: Any, line: Any) -> Any:
    """The stored numbers of a row; `lines` are three pieces of scratch, the last of four lines.

    Where products are all that is asked of a codebook, these instead.
    """
    groups = (at(f, 33) + at(f, 32) - 1) // at(f, 32)
    row, second = at(f, 11) + o * at(f, 12) + t * at(f, 13), lines + line
    words = second + line
    _grid(f, o, t, groups, lines, second)
    if at(f, 27) == VECTORS:
        _places(f, row, at(f, 33) // at(f, 34), words, words + line)
        if at(f, 26) == PRODUCTS:
            _codebook_scores(f, o, t, lines, words)
        else:
            _of_a_codebook(f, lines, words, out)
    elif at(f, 28) == 2:
        _of_four_levels(f, row, lines, second, words, out)
    else:
        _on_a_grid(f, row, lines, second, words, out)


@device
def _open(f: Any, o: Any, t: Any, numbers: Any, words: Any, out: Any) -> Any:
    """Put stored numbers between zeros."""
    channels, keep, of, bits = at(f, 6), at(f, 35), at(f, 36), at(f, 37)
    groups = (channels + of - 1) // of
    row = at(f, 20) + o * at(f, 21) + t * at(f, 22)
    _words(row, groups, bits, (groups * bits + 7) // 8, words)
    jit.fill(out, channels, 0.0)
    for g in range(groups):
        places = at(f, 38) + 2 * keep * min(jit.read_word(words + 2 * g), at(f, 39) - 1)
        for k in range(keep):
            place = g * of + jit.read_word(places + 2 * k)
            if place < channels:
                jit.write_float(out + 4 * place, jit.read_float(numbers + 4 * (g * keep + k)))


@device
def _kept_scores(f: Any, o: Any, t: Any, numbers: Any, words: Any) -> Any:
    """Products of a row of a 2:4 mask with the queries."""
    groups = (at(f, 6) + 3) // 4
    count = (groups + 7) // 8 * 4
    _words(at(f, 20) + o * at(f, 21) + t * at(f, 22), (groups + 1) // 2, 6, (groups * 3 + 7) // 8, words)
    for j in range(2 * groups, 4 * count):
        jit.write_float(numbers + 4 * j, np.float32(0))
    for m in range(at(f, 7)):
        x = at(f, 23) + 4 * (o * at(f, 7) + m) * at(f, 24)
        total = lookups.kept_product(numbers, words, x, at(f, 40), count)
        jit.write_float(at(f, 25) + 4 * ((o * at(f, 7) + m) * at(f, 5) + t), total)


@device
def _use(f: Any, o: Any, start: Any, count: Any, rows: Any, total: Any) -> Any:
    """Do with decoded rows what is to be done."""
    tokens, channels, queries = at(f, 5), at(f, 6), at(f, 7)
    row = 4 * (o * queries * tokens + start)
    if at(f, 26) == SCORES:
        query = at(f, 23) + 4 * o * queries * at(f, 24)
        products(rows, 4 * channels, count, channels, query, queries, at(f, 25) + row, 4 * tokens)
    elif at(f, 26) == MIX:
        sums(rows, 4 * channels, count, channels, at(f, 23) + row, queries, total, 4 * tokens)
    elif at(f, 26) == DENSE:
        size = 4 if at(f, 31) == jit.FLOAT32 else 2
        place = at(f, 25) + size * (o * tokens + start) * channels
        jit.narrow(rows, count * channels, place, at(f, 31))


@device
def _work(f: Any) -> Any:
    """Take items until none is left."""
    channels, together, masked = at(f, 6), at(f, 10), at(f, 20) != 0
    line = 4 * (max(channels, at(f, 33)) + ROOM)
    rows = at(f, 3) + jit.add_to(f + 16, 1) * at(f, 4)
    numbers = rows + 4 * together * channels
    lines = numbers + line
    outer = at(f, 1) // at(f, 9)
    while True:
        item = jit.add_to(f, 1)
        if item >= at(f, 1):
            break
        o, part = item // at(f, 9), item % at(f, 9)
        last = min(at(f, 5), (part + 1) * at(f, 8))
        total = at(f, 25) + 4 * (part * outer + o) * at(f, 7) * channels
        if at(f, 26) == MIX:
            jit.fill(total, at(f, 7) * channels, 0.0)
        for start in range(part * at(f, 8), last, together):
            count = min(together, last - start)
            for i in range(count):
                row = rows + 4 * i * channels
                _stored(f, o, start + i, numbers if masked else row, lines, line)
                if masked and at(f, 26) == PRODUCTS:
                    _kept_scores(f, o, start + i, numbers, lines + 2 * line)
                elif masked:
                    _open(f, o, start + i, numbers, lines + 2 * line, row)
            if at(f, 26) != PRODUCTS:
                _use(f, o, start, count, rows, total)


def compiled() -> Any:
    """The loop as a C function; numba keeps it where `objects` does not."""
    stamp = jit.stamp()

    @cfunc(ENTRY, cache=jit.KEPT_BY_NUMBA)
    def run(pointer: Any) -> None:
        if stamp:
            _work(jit.address_of(pointer))

    return run
