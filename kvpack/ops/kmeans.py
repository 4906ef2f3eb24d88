"""Weighted k-means on a line: exact Lloyd steps on sorted numbers, seeded without chance.

On a line the clusters are intervals, so that with prefix sums of the sorted numbers one step costs
as many look-ups as there are centres, whatever the number of points.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_POINTS = 1 << 18
"""Up to so many points are sorted one by one; more are pooled first, in `BINS` equal intervals."""
BINS = 1 << 16


def fit(values: Tensor, weights: Tensor | None, count: int, steps: int = 300) -> Tensor:
    """Centres that make the weighted sum of squared distances small.

    Lloyd's steps from two starts, equal shares of the weight and equal intervals; the better end
    wins, so that the result is never worse than the even grid.

    Args:
        values: [N], finite.
        weights: [N], not negative; None, or without any positive one: all weigh the same.
        count: how many centres.
        steps: at most so many steps from each start; they end when no centre moves any more.

    Returns:
        float64 [count], ascending. Centres repeat where there are fewer different numbers.
    """
    flat = values.flatten()
    shares = torch.ones_like(flat) if weights is None or not bool((weights > 0).any()) else weights.flatten()
    points, mass = _condensed(flat, shares)
    sums = _Sums(points, mass)
    starts = (sums.at_shares(count), _even(points, count))
    ends = [_settled(sums, start, steps) for start in starts]
    return min(ends, key=sums.cost)


def boundaries(centres: Tensor) -> Tensor:
    """Where the nearest centre changes: the middles between neighbours."""
    return (centres[1:] + centres[:-1]) / 2


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest of the ascending `centres`, int64, shaped as `x`."""
    return torch.bucketize(x, boundaries(centres))


class _Sums:
    """Sorted points with prefix sums of mass, mass * x and mass * x^2."""

    def __init__(self, points: Tensor, mass: Tensor) -> None:
        self.points = points
        zero = points.new_zeros(1)
        self._sums = [torch.cat((zero, (mass * points**n).cumsum(0))) for n in range(3)]

    def at_shares(self, count: int) -> Tensor:
        """Points in the middles of `count` equal shares of the mass."""
        mass = self._sums[0]
        shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count * mass[-1]
        return self.points[torch.searchsorted(mass[1:], shares).clamp(max=len(self.points) - 1)]

    def of(self, centres: Tensor) -> list[Tensor]:
        """Mass, mass * x and mass * x^2 of every centre's interval."""
        inner = torch.searchsorted(self.points, boundaries(centres))
        ends = torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), len(self.points))))
        return [s[ends[1:]] - s[ends[:-1]] for s in self._sums]

    def cost(self, centres: Tensor) -> float:
        """Weighted sum of squared distances."""
        mass, first, second = self.of(centres)
        return float((second - 2 * centres * first + centres**2 * mass).sum())


def _settled(sums: _Sums, centres: Tensor, steps: int) -> Tensor:
    """Move every centre to the mean of its interval until none moves; empty ones stay."""
    for _ in range(steps):
        mass, first, _ = sums.of(centres)
        moved = torch.where(mass > 0, first / mass.clamp(min=1e-300), centres).sort().values
        if bool((moved - centres).abs().max() <= 1e-9 * centres.abs().max()):
            return moved
        centres = moved
    return centres


def _even(points: Tensor, count: int) -> Tensor:
    width = (points[-1] - points[0]) / count
    return points[0] + width * (torch.arange(count, dtype=torch.float64) + 0.5)


def _condensed(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted points and their mass, scaled to a sum of one; both float64."""
    if values.numel() <= EXACT_POINTS:
        points, order = values.double().sort()
        mass = weights.double()[order]
        return points, mass / mass.sum()
    low, high = values.aminmax()
    places = ((values - low) * (BINS / (high - low).clamp(min=1e-30))).long().clamp_(0, BINS - 1)
    mass = torch.bincount(places, weights.double(), BINS)
    first = torch.bincount(places, (weights * values).double(), BINS)
    some = mass > 0
    return first[some] / mass[some], mass[some] / mass.sum()
