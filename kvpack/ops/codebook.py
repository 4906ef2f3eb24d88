"""Normalised numbers and their codebook: ranges, and the norm that undoes what rounding shrinks.

Source: KVQuant, arXiv 2401.18079, sections 3.3 (nuqX) and 3.6 (Q-Norm).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.ops import kmeans

_LIMIT = torch.finfo(torch.float16).max


def middle(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half the width of ranges, float16; no width where all numbers are equal."""
    centre, half = (upper + lower) / 2, (upper - lower) / 2
    return centre.clamp(-_LIMIT, _LIMIT).half(), half.clamp(max=_LIMIT).half()


def normalised(x: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """``(x - centre) / scale`` in float32; 0 for the middle of a range without width."""
    return ((x - centre.float()) / scale.float()).nan_to_num(0.0).contiguous()


def norm(points: Tensor, codebook: Tensor) -> Tensor:
    """The alpha and beta, float32 [2], with which rounded points keep their mean and deviation.

    alpha = std(points) / std(rounded), beta = mean(points) - alpha * mean(rounded).

    Args:
        points: normalised numbers [N].
        codebook: ascending levels.
    """
    places = kmeans.nearest(points, codebook.float())
    share = torch.bincount(places, minlength=len(codebook)).double() / len(points)
    levels = codebook.double()
    mean = (share * levels).sum()
    spread = (share * (levels - mean).square()).sum().sqrt()
    own = points.std(correction=0).double()
    alpha = own / spread if spread > 0 else torch.ones_like(spread)
    return torch.stack((alpha, points.mean().double() - alpha * mean)).float()
