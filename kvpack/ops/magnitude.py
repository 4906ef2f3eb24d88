"""Mean magnitudes of grouped numbers: the scales of codes that hold little more than a sign."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.ops import affine, rows


def group_mean(x: Tensor, counts: Tensor, axis: str, size: int) -> Tensor:
    """Mean of |x| over the numbers of each group that count, 0 where none does.

    Args:
        x: [..., T, D].
        counts: bool, broadcasts against `x`; numbers that do not count may be anything.
        axis: "channel" or "token".
        size: numbers of a group; 0 for all channels. A last group of channels may be shorter.

    Returns:
        float32 [..., T, ceil(D/size)] or [..., T/size, D].
    """
    counts = counts.expand(x.shape)
    dim = affine.group_axis(axis)
    magnitude = _split(x.float().abs().masked_fill(~counts, 0), axis, size)
    number = _split(counts.float(), axis, size).sum(dim)
    # Shares are summed, not magnitudes: a sum of the largest numbers would overflow.
    return (magnitude / number.clamp(min=1).unsqueeze(dim)).sum(dim)


def spread(groups: Tensor, axis: str, size: int, channels: int) -> Tensor:
    """One number per group [..., T, ceil(D/size)] or [..., T/size, D] -> one per element [..., T, D]."""
    if axis == "token":
        return groups.repeat_interleave(size, -2)
    return groups.repeat_interleave(affine.group_size(channels, size), -1)[..., :channels]


def counted(x: Tensor, valid: Tensor | None) -> Tensor:
    """Which numbers of `x` [B, ..., T, D] belong to tokens that count, as `group_mean` takes it."""
    return x.new_ones((), dtype=torch.bool) if valid is None else rows.mask(valid, x)


def stored(scale: Tensor) -> Tensor:
    """A scale in float16, cut to what is finite there."""
    return scale.clamp(max=torch.finfo(torch.float16).max).half()


def _split(x: Tensor, axis: str, size: int) -> Tensor:
    missing = -x.shape[-1] % affine.group_size(x.shape[-1], size) if axis == "channel" else 0
    return affine.split(torch.nn.functional.pad(x, (0, missing)), axis, size)
