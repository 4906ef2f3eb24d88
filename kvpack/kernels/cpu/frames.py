"""What compiled loops and those who call them agree on: modes, kinds of numbers, sizes of scratch.

Without numba: whoever calls a loop that is compiled already needs none (`objects`).
"""

from __future__ import annotations

FLOAT32, FLOAT16, BFLOAT16, FLOAT8, INT8 = range(5)
"""How a number is stored, as kernels are told."""
CHANNEL, TOKEN = 0, 1
"""Axis of the groups."""
OFFSET, CENTRED, CENTRED_INTEGER = range(3)
"""Zeros: numbers are code * step + zero, (code - h) * step, (code - (zero + h)) * step."""
SCORES, MIX, DENSE = range(3)
"""What `affine_rows` does. Outputs: scores [o, M, T] of queries [o, M, D]; sums [part, o, M, D] of the rows
with weights [o, M, T], for every part of the rows; the rows [o, T, D] themselves."""
RANGES, CODES, ENCODE, LOST, SQUARES = range(5)
"""What `affine_encode_rows` does. Ranges: write least and greatest numbers, float32, to 18 and 19. Codes:
write bit streams to 20, by the steps and zeros in 18 and 19. Encode: write steps and zeros, too. Lost: read
all three, and write two sums per row, float32, to 24: of the squares of what codes lose, and of the squares
of the numbers. Squares: the same with the float32 rows in 18 instead of codes."""
LANES = 16
"""Numbers of a vector."""
TILE = 32
"""Rows that are decoded at a time."""
MOST_CHANNELS = 128
"""Channels of a chunk that is multiplied in integers: sums fit 32 bits for every width."""
GROUPS = 8
"""Groups of such a row that are taken at a time; scratch is padded to a multiple of it."""
TOGETHER = (1, 2, 4)
"""How many integer vectors are multiplied with a row at a time."""
UNROLLED = (128, 64, 32)
"""Channels per chunk for which one vector has code without inner loops; others, and more vectors, loop."""
UNROLLED_STEP = 8


def field_span(bits: int, group: int) -> int:
    """Codes that one step takes from a group: those of sixteen words where that works, else 16."""
    fields = 16 // bits if bits in (2, 4, 8) else 1
    return fields * LANES if group % (fields * LANES) == 0 else LANES


def whole_vectors(channels: int) -> int:
    """Channels, filled up to whole vectors."""
    return -(-channels // LANES) * LANES


def affine_scratch(channels: int) -> int:
    """Scratch of a thread of `affine_rows`: a tile of numbers, steps and offsets."""
    return 3 * 4 * TILE * channels


def encode_scratch(channels: int) -> int:
    """Scratch of a thread of `affine_encode_rows`.

    It holds steps, offsets, both as they are stored, ranges, and the codes of a row.
    """
    return (6 * 4 + 1) * whole_vectors(channels)


def integer_scratch(channels: int, integers: int, chunks: int, groups: int) -> int:
    """Scratch of a thread of `integer_rows`.

    It holds integers, factors and sums of the vectors; results, weights and grid of a row. `groups`
    is padded to a multiple of `GROUPS`.
    """
    held = 2 * integers * channels + 4 * (integers * chunks + GROUPS + integers * groups)
    row = 4 * TOGETHER[-1] * (1 + LANES // 2 + chunks + GROUPS) + 12 * groups
    return held + max(row, 4 * (MOST_CHANNELS + 2))


def integer_key(bits: int, fields: int, chunk: int) -> int:
    """Which version of `integer_vectors.row` multiplies a row of such codes."""
    unrolled = UNROLLED.index(chunk) + 1 if chunk in UNROLLED else 0
    return bits * 64 + (fields > 1) * 32 + unrolled * UNROLLED_STEP


def attention_scratch(channels: int, queries: int) -> int:
    """Scratch of a thread of `affine_attention`.

    It holds a tile of numbers, steps and offsets; scores of a tile; maxima and sums of weights.
    """
    return 4 * (TILE * (3 * channels + queries) + 2 * queries)
