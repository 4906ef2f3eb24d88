"""Columns that are rounded one after the other, for some rows of the weight at a time.

Numbers of a frame (addresses, sizes; matrices lie row after row):

     0 counter, 1 items, 2 threads that have begun, 3 scratch, 4 scratch bytes of a thread,
     5 columns n, 6 rows R, 7 highest code, 8 whether grids are centred,
     9 columns as rows [n, R], 10 what an error changes in later columns, by these [n, n],
    11 diagonal of the factor [n], 12 grid of every column int64 [n], 13 steps [grids, R],
    14 offsets [grids, R], 15 codes as float32 [n, R], 16 errors [n, R].

A column receives the errors of all columns before it at once; they stay in the first-level cache for
`WIDTH` rows. Divisions and roundings are those of `kvpack.ops.affine`: only the order of sums differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc

from kvpack.kernels.cpu import jit, vectors
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.jit import ENTRY, FLOAT32, at, device

WIDTH = 32
"""Rows that are rounded together, a multiple of `LANES`."""


def scratch_bytes(columns: int) -> int:
    """Scratch of a thread: a column, its codes, steps and offsets; the errors of all columns."""
    return 4 * WIDTH * (4 + columns)


@device
def _round(column: Any, highest: Any, centred: Any, pivot: Any, lost: Any) -> Any:
    """Codes of a column, behind it in the scratch, and its errors; steps and offsets lie behind these."""
    for place in range(column, column + 4 * WIDTH, 4):
        number = jit.read_float(place)
        step, offset = jit.read_float(place + 8 * WIDTH), jit.read_float(place + 12 * WIDTH)
        code = np.rint(number / step) + offset if centred else np.rint((number - offset) / step)
        code = np.float32(0) if np.isnan(code) else min(max(code, np.float32(0)), highest)
        stands_for = (code - offset) * step if centred else code * step + offset
        jit.write_float(place + 4 * WIDTH, code)
        jit.write_float(lost + (place - column), (number - stands_for) / pivot)


@device
def _work(f: Any) -> Any:
    count, rows, highest = at(f, 5), at(f, 6), np.float32(at(f, 7))
    column = at(f, 3) + jit.add_to(f + 16, 1) * at(f, 4)
    codes, step, offset = column + 4 * WIDTH, column + 8 * WIDTH, column + 12 * WIDTH
    errors = column + 16 * WIDTH
    while True:
        item = jit.add_to(f, 1)
        if item >= at(f, 1):
            break
        first = item * WIDTH
        wide = min(WIDTH, rows - first)
        jit.fill(column, 4 * WIDTH, 1.0)
        for j in range(count):
            here, lost = 4 * (j * rows + first), errors + 4 * WIDTH * j
            grid = 4 * (jit.read_integer(at(f, 12) + 8 * j) * rows + first)
            jit.widen(at(f, 9) + here, FLOAT32, wide, column)
            jit.widen(at(f, 13) + grid, FLOAT32, wide, step)
            jit.widen(at(f, 14) + grid, FLOAT32, wide, offset)
            if j:
                for part in range(0, 4 * WIDTH, 4 * LANES):
                    vectors.add_rows(column + part, errors + part, 4 * WIDTH, at(f, 10) + 4 * j * count, j)
            _round(column, highest, at(f, 8), jit.read_float(at(f, 11) + 4 * j), lost)
            jit.widen(codes, FLOAT32, wide, at(f, 15) + here)
            jit.widen(lost, FLOAT32, wide, at(f, 16) + here)


def compiled() -> Any:
    """The loop as a C function; numba keeps it where `objects` does not."""
    stamp = jit.stamp()

    @cfunc(ENTRY, cache=jit.KEPT_BY_NUMBA)
    def run(pointer: Any) -> None:
        if stamp:
            _work(jit.address_of(pointer))

    return run
