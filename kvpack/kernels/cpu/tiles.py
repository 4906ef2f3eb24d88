"""What is done with a few decoded rows: products with queries, weighted sums."""

from __future__ import annotations

from typing import Any

from kvpack.kernels.cpu import jit, vectors
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.frames import TILE as TILE
from kvpack.kernels.cpu.jit import device


@device
def products(rows: Any, count: Any, channels: Any, query: Any, queries: Any, out: Any, tokens: Any) -> Any:
    """Products of `count` rows with the queries [M, D], to the first columns of `out` [M, T]."""
    whole = queries // 4 * 4 if channels % LANES == 0 else 0
    for i in range(count):
        row = rows + 4 * i * channels
        for m in range(0, whole, 4):
            place = out + 4 * (m * tokens + i)
            vectors.four_dots(row, query + 4 * m * channels, 4 * channels, channels, place, 4 * tokens)
        for m in range(whole, queries):
            total = vectors.product(row, query + 4 * m * channels, channels)
            jit.write_float(out + 4 * (m * tokens + i), total)


@device
def sums(rows: Any, count: Any, channels: Any, weights: Any, tokens: Any, queries: Any, out: Any) -> Any:
    """Add `count` rows, with the first columns of the weights [M, T], to `out` [M, D]."""
    whole, fours = channels // LANES * LANES, queries // 4 * 4
    width, line = 4 * channels, 4 * tokens
    for j in range(0, whole, LANES):
        for m in range(0, fours, 4):
            first, target = weights + m * line, out + m * width + 4 * j
            vectors.add_rows_to_four(target, width, rows + 4 * j, width, first, line, count)
        for m in range(fours, queries):
            vectors.add_rows(out + m * width + 4 * j, rows + 4 * j, width, weights + m * line, count)
    for m in range(queries):
        for j in range(whole, channels):
            total = jit.read_float(out + m * width + 4 * j)
            for i in range(count):
                total += jit.read_float(weights + m * line + 4 * i) * jit.read_float(rows + i * width + 4 * j)
            jit.write_float(out + m * width + 4 * j, total)
