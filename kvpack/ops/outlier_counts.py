"""How many entries of a vector are extreme, and how wide their places are. No torch: plans count."""

from __future__ import annotations

import math


def sides(keep: float, length: int) -> tuple[int, int]:
    """How many of the smallest and of the largest of `length` entries are extreme.

    ceil(keep/2 * length) each, at least one for keep > 0; both together at most `length`, where
    the largest come first. Sources: KVQuant's official cap (21 a side of 4096 at 1 %); GEAR, arXiv
    2403.05527, section 3.
    """
    each = math.ceil(keep / 2 * length - 1e-9)
    largest = min(each, (length + 1) // 2)
    return min(each, length - largest), largest


def index_dtype(length: int) -> str:
    """The narrowest dtype for places in a vector of `length` entries."""
    if length <= 1 << 8:
        return "uint8"
    return "int16" if length <= 1 << 15 else "int32"
