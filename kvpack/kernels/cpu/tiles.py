"""What is done with a few decoded rows: products with queries, weighted sums."""

from __future__ import annotations

from typing import Any

from kvpack.kernels.cpu import jit, vectors
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.frames import TILE as TILE
from kvpack.kernels.cpu.jit import device


@device
def products(
    rows: Any, stride: Any, count: Any, channels: Any, query: Any, queries: Any, out: Any, line: Any
) -> Any:
    """Products of `count` rows, `stride` bytes apart, with the queries [M, D], to the first columns of `out`.

    `line` bytes lie between what belongs to one query and the next.
    """
    pairs = count // 2 * 2 if channels % 8 == 0 else 0
    fours, width = queries // 4 * 4 if pairs else 0, 4 * channels
    for i in range(0, pairs, 2):
        row = rows + i * stride
        for m in range(0, fours, 4):
            place = out + m * line + 4 * i
            vectors.two_by_four_dots(row, stride, query + m * width, width, channels, place, line)
    for i in range(count):
        row = rows + i * stride
        for m in range(fours if i < pairs else 0, queries):
            jit.write_float(out + m * line + 4 * i, vectors.product(row, query + m * width, channels))


@device
def sums(
    rows: Any, stride: Any, count: Any, channels: Any, weights: Any, queries: Any, out: Any, line: Any
) -> Any:
    """Add `count` rows, `stride` bytes apart, with the first columns of the weights to `out` [M, D].

    `line` bytes lie between the weights of one query and the next.
    """
    whole, fours, width = channels // LANES * LANES, queries // 4 * 4, 4 * channels
    for j in range(0, whole, LANES):
        for m in range(0, fours, 4):
            first, target = weights + m * line, out + m * width + 4 * j
            vectors.add_rows_to_four(target, width, rows + 4 * j, stride, first, line, count)
        for m in range(fours, queries):
            vectors.add_rows(out + m * width + 4 * j, rows + 4 * j, stride, weights + m * line, count)
    for m in range(queries):
        for j in range(whole, channels):
            total = jit.read_float(out + m * width + 4 * j)
            for i in range(count):
                weight = jit.read_float(weights + m * line + 4 * i)
                total += weight * jit.read_float(rows + i * stride + 4 * j)
            jit.write_float(out + m * width + 4 * j, total)
