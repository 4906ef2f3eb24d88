"""How decode attention over affine codes is cut into tiles and programs."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton

from kvpack.kernels.triton.bits import unit, zero_kind
from kvpack.ops.packed_affine import AffineCodes

WHOLE = 1 << 30
"""Tokens in a group that is the whole axis."""
MAX_ROWS = 64
"""Pairs of groups and query heads that the matrix unit takes at once."""
MOST_TOKENS = {1: 64, 2: 128, 4: 128, 8: 32}
"""Tokens in a tile by the codes of a unit: more would not fit in a thread's registers."""
PROGRAMS_PER_MULTIPROCESSOR = 4


def fits(keys: AffineCodes, values: AffineCodes, heads: int) -> bool:
    """Whether `affine_attention` takes these codes with `heads` query rows per kv head."""
    if keys.codes.dim() != 4 or values.codes.dim() != 4 or keys.codes.shape[:2] != values.codes.shape[:2]:
        return False
    return max(keys.channels, values.channels) <= 256 and tile_tokens(keys, values, heads, torch.float16) > 0


class Side:
    """What the kernel asks of keys, or of values."""

    def __init__(self, x: AffineCodes, tile: int) -> None:
        self.scale = x.scale
        self.zero = x.scale if x.zero is None else x.zero
        if self.scale.stride() != self.zero.stride() or self.scale.stride(-1) != 1:
            self.scale, self.zero = self.scale.contiguous(), self.zero.contiguous()
        self.groups = tile_groups(x, tile)
        count, size = unit(x.bits)
        units = max(16, triton.next_power_of_2(-(-x.channels // count)))
        self.constants = (
            x.codes.stride(2), self.scale.stride(2), x.channels, x.axis == "token", group_size(x),
            self.groups, units, count, size, x.bits, zero_kind(x.zero),
        )  # fmt: skip


def group_size(x: AffineCodes) -> int:
    """Tokens, or channels, that share a step."""
    if x.axis == "token":
        return x.size or WHOLE
    return min(x.size or x.channels, x.channels)


def tile_groups(x: AffineCodes, tile: int) -> int:
    """Groups that a tile may hold, rounded up to a power of two."""
    size = group_size(x)
    if x.axis == "channel":
        return triton.next_power_of_2(-(-x.channels // size))
    if size % tile == 0 or tile % size == 0:
        return max(1, tile // size)
    return triton.next_power_of_2((tile - 2) // size + 2)


def padded_heads(heads: int, *groups: int) -> int:
    """Query heads rounded up so that they and the groups fill 16 rows of the matrix unit."""
    return max(triton.next_power_of_2(heads), 16 // min(*groups, 16))


def tile_tokens(keys: AffineCodes, values: AffineCodes, heads: int, dtype: torch.dtype) -> int:
    """Tokens that a program takes at once; 0 if there is no good number."""
    most = 32 if dtype == torch.float32 else min(MOST_TOKENS[unit(x.bits)[0]] for x in (keys, values))
    for tile in (128, 64, 32):
        groups = tile_groups(keys, tile), tile_groups(values, tile)
        if tile <= most and padded_heads(heads, *groups) * max(groups) <= MAX_ROWS:
            return tile
    return 0


def split_tokens(
    tokens: int, tile: int, rows: int, device: torch.device, wanted: int | None
) -> tuple[int, int]:
    """How many programs share the tokens, and how many tokens each of them has."""
    tiles = max(1, -(-tokens // tile))
    if wanted is None:
        cores = 4
        if device.type == "cuda":
            cores = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = max(1, cores * PROGRAMS_PER_MULTIPROCESSOR // rows)
    each = -(-tiles // min(wanted, tiles))
    return -(-tiles // each), each * tile
