"""Large matrices in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

PIECE_ELEMENTS = 1 << 20
"""Numbers per piece, 4 MiB in float32.

Two threads rounding 4-bit weights came to 153, 353, 464, 379 and 252 MB of source per second with pieces of
2^17 to 2^21 numbers, in 3 bits to 115, 183, 255, 342 and 199: smaller ones wait for the interpreter, larger
ones for memory.
"""


def row_pieces(rows: int, columns: int, block: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `PIECE_ELEMENTS` numbers, each a multiple of `block` rows."""
    step = max(1, PIECE_ELEMENTS // max(1, columns * block)) * block
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
