"""Four levels {-a, -b, b, a} per group: a histogram with two humps has nothing to code near zero.

The magnitudes of a group are divided into a small and a large class such that the squared distance to
the classes' means is least: k-means in one dimension with two classes, solved exactly by sorting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.ops import affine

Grid = dict[str, Tensor]


def fit(x: Tensor, size: int) -> Grid:
    """Levels of groups of `size` neighbours of [..., D]: "small" and "large" float16 [..., ceil(D/size)]."""
    channels = x.shape[-1]
    whole = channels // size * size
    parts = [torch.unflatten(x[..., :whole], -1, (whole // size, size))] if whole else []
    if whole < channels:
        parts.append(x[..., None, whole:])
    found = [_two_means(part.float().abs().nan_to_num(0.0)) for part in parts]
    limit = torch.finfo(torch.float16).max
    small, large = (torch.cat(levels, -1).clamp(max=limit).half() for levels in zip(*found, strict=True))
    return {"small": small, "large": large}


def _two_means(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the best two classes along the last axis [..., n]; equal where one is enough."""
    n = magnitude.shape[-1]
    ordered, _ = magnitude.double().sort(-1)
    below = ordered.cumsum(-1)
    whole = below[..., -1:]
    count = torch.arange(1, n + 1, device=magnitude.device)
    others = (n - count).clamp(min=1)
    explained = below.square() / count + (whole - below).square() / others
    best = explained.argmax(-1, keepdim=True)
    sums = below.gather(-1, best)
    small = sums / (best + 1)
    large = torch.where(best == n - 1, small, (whole - sums) / (n - 1 - best).clamp(min=1))
    return small[..., 0], large[..., 0]


def snap(x: Tensor, grid: Grid, size: int) -> Tensor:
    """Nearest levels of `x` [..., D] in ascending order, uint8 0 to 3."""
    split = affine.split(x.float().nan_to_num(0.0), "channel", size)
    middle = (grid["small"].float() + grid["large"].float()) / 2
    far = (split.abs() > middle.unsqueeze(-1)).to(torch.uint8)
    return affine.join(torch.where(split.signbit(), 1 - far, 2 + far), "channel", x.shape[-1])


def value(codes: Tensor, grid: Grid, size: int) -> Tensor:
    """The numbers that codes stand for, float32."""
    split = affine.split(codes, "channel", size)
    small, large = (grid[name].float().unsqueeze(-1) for name in ("small", "large"))
    magnitude = torch.where((split == 0) | (split == 3), large, small)
    return affine.join(torch.where(split < 2, -magnitude, magnitude), "channel", codes.shape[-1])
