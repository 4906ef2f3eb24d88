"""Large matrices in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

PIECE_ELEMENTS = 1 << 17
"""Numbers per piece: 512 KiB in float32, which caches hold; larger ones were measured to be slower."""


def row_pieces(rows: int, columns: int, block: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `PIECE_ELEMENTS` numbers, each a multiple of `block` rows."""
    step = max(1, PIECE_ELEMENTS // max(1, columns * block)) * block
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
