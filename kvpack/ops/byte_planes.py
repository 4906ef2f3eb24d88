"""Items taken apart into byte planes, the bytes of equal significance side by side; exactly invertible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def split(raw: Tensor, item: int, *, turn: bool) -> list[Tensor]:
    """Byte planes of items, the most significant first.

    Args:
        raw: uint8 [N * item], little-endian items.
        item: bytes of one, 1, 2, 4 or 8.
        turn: first rotate every item left by one bit. The sign of a floating-point number then comes
            last, and the exponent of bfloat16 and float32 is the whole first plane.

    Returns:
        `item` tensors, uint8 [N].
    """
    if turn and item > 1:
        integers = raw.view(_INTEGERS[item])
        raw = ((integers << 1) | ((integers >> (8 * item - 1)) & 1)).view(torch.uint8)
    columns = raw.view(-1, item)
    return [columns[:, i].contiguous() for i in reversed(range(item))]


def join(planes: Sequence[Tensor], out: Tensor, *, turn: bool) -> None:
    """Invert `split`: write the items into `out`, uint8 [N * len(planes)]."""
    item = len(planes)
    columns = out.view(-1, item)
    for plane, i in zip(planes, reversed(range(item)), strict=True):
        columns[:, i] = plane
    if turn and item > 1:
        integers, bits = out.view(_INTEGERS[item]), 8 * item
        lowest = integers << (bits - 1)
        integers.bitwise_right_shift_(1).bitwise_and_((1 << (bits - 1)) - 1).bitwise_or_(lowest)
