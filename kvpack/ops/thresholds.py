"""Thresholds on magnitudes, from a histogram per channel that one pass over the data fills.

Bins are of equal width in log2: `STEPS` to an octave from 2^`LOWEST` on, and one for what is below
(zeros among it). A quantile is interpolated within its bin. All tokens count the same, however they
were cut into documents, which averages of quantiles per document do not achieve.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 8
LOWEST, HIGHEST = -24, 8
BINS = (HIGHEST - LOWEST) * STEPS
_ROUNDS = 50


def histogram(x: Tensor) -> Tensor:
    """Counts of the magnitudes of each channel: `x` [N, C] -> int64 [C, 1 + BINS].

    Magnitudes of 2^`HIGHEST` and more are counted in the last bin.
    """
    octave = x.float().abs().log2().nan_to_num(nan=HIGHEST, neginf=LOWEST - 1, posinf=HIGHEST)
    place = ((octave - LOWEST) * STEPS).floor().add(1).clamp(0, BINS).long()
    channels = x.shape[-1]
    place += torch.arange(channels, device=x.device) * (1 + BINS)
    return torch.bincount(place.flatten(), minlength=channels * (1 + BINS)).view(channels, -1)


def cut(counts: Tensor, importance: Tensor, keep_fraction: float) -> Tensor:
    """Where |x_i| * importance_i is cut so that `keep_fraction` of all numbers is left, float64 scalar.

    Solves ``sum_i P(|x_i| * importance_i < tau) = (1 - keep_fraction) * C`` by bisection.

    Args:
        counts: of `histogram`, [C, 1 + BINS].
        importance: positive, [C]; 0 for channels that are never kept.
        keep_fraction: within (0, 1]; 1 gives 0.
    """
    if keep_fraction >= 1:
        return torch.zeros((), dtype=torch.float64)
    below = counts.double().cumsum(-1)
    below = below / below[:, -1:].clamp(min=1)
    alive = importance > 0
    shift = importance.double()[alive].log2() * STEPS
    wanted = (1 - keep_fraction) * len(importance) - int((~alive).sum())
    if wanted <= 0 or not len(shift):
        return torch.zeros((), dtype=torch.float64)
    low, high = shift.min(), shift.max() + BINS
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        enough = _share(below[alive], middle - shift).sum() >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return torch.exp2(high / STEPS + LOWEST)


def _share(below: Tensor, place: Tensor) -> Tensor:
    """Share of each channel below a place [C] on the axis of bins, interpolated."""
    place = place.clamp(0, BINS)
    left = place.floor().long().clamp(max=BINS - 1)
    first, second = (below.gather(-1, at[:, None])[:, 0] for at in (left, left + 1))
    return first + (second - first) * (place - left)


def masked(x: Tensor, threshold: Tensor) -> Tensor:
    """`x` [..., C] where its magnitude reaches the threshold [C] or [1], 0 elsewhere."""
    return torch.where(x.abs() >= threshold, x, torch.zeros((), dtype=x.dtype, device=x.device))
