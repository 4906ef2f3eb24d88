"""What is done with a few decoded rows: products with queries, weighted sums."""

from __future__ import annotations

from typing import Any

from kvpack.kernels.cpu import jit, vectors
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.jit import device

TILE = 32
"""Rows that are decoded at a time."""


@device
def products(rows: Any, count: Any, channels: Any, query: Any, queries: Any, out: Any, tokens: Any) -> Any:
    """Products of `count` rows with the queries [M, D], to the first columns of `out` [M, T]."""
    for i in range(count):
        row = rows + 4 * i * channels
        for m in range(queries):
            total = vectors.product(row, query + 4 * m * channels, channels)
            jit.write_float(out + 4 * (m * tokens + i), total)


@device
def sums(rows: Any, count: Any, channels: Any, weights: Any, tokens: Any, queries: Any, out: Any) -> Any:
    """Add `count` rows, with the first columns of the weights [M, T], to `out` [M, D]."""
    whole = channels // (2 * LANES) * (2 * LANES)
    for m in range(queries):
        first, target = weights + 4 * m * tokens, out + 4 * m * channels
        for j in range(0, whole, 2 * LANES):
            vectors.add_rows(target + 4 * j, rows + 4 * j, 4 * channels, first, count)
        for j in range(whole, channels):
            total = jit.read_float(target + 4 * j)
            for i in range(count):
                total += jit.read_float(first + 4 * i) * jit.read_float(rows + 4 * (i * channels + j))
            jit.write_float(target + 4 * j, total)
