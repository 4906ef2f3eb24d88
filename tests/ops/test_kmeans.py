"""k-means on a line against slow references."""

import numpy as np
import pytest
import torch

from kvpack.ops import kmeans
from tests.contracts.discovery import random

NF3 = torch.tensor([-1.0, -0.5350, -0.2469, 0.0, 0.1833, 0.3819, 0.6229, 1.0])
"""The 3-bit NormalFloat grid, QLoRA's construction (arXiv 2305.14314)."""


def cost(points: torch.Tensor, weights: torch.Tensor, centres: torch.Tensor) -> float:
    distances = (points.double()[:, None] - centres.double()[None]).square().amin(1)
    return float((weights.double() * distances).sum())


def optimum(points: torch.Tensor, weights: torch.Tensor, count: int) -> float:
    """The least cost of any clustering into intervals, by dynamic programming."""
    order = points.argsort()
    x, w = points[order].double().numpy(), weights[order].double().numpy()
    sums = [np.concatenate(([0.0], np.cumsum(w * x**n))) for n in range(3)]

    def interval(start: int, stop: int) -> float:
        mass, first, second = (s[stop] - s[start] for s in sums)
        return max(0.0, second - first**2 / mass) if mass > 0 else 0.0

    best = [0.0] + [np.inf] * len(x)
    for _ in range(count):
        best = [
            min([best[stop], *(best[start] + interval(start, stop) for start in range(stop))])
            for stop in range(len(x) + 1)
        ]
    return best[-1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 4])
def test_close_to_the_optimum(seed: int, count: int) -> None:
    points, weights = random(60, seed=seed), random(60, seed=seed + 50).square()
    found = cost(points, weights, kmeans.fit(points, weights, count))
    assert optimum(points, weights, count) - 1e-9 <= found <= 1.3 * optimum(points, weights, count)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_centre_is_the_mean_of_its_points(weighted: bool) -> None:
    points = random(5000)
    weights = random(5000, seed=1).square() if weighted else torch.ones(5000)
    centres = kmeans.fit(points, weights if weighted else None, 8)
    nearest = (points.double()[:, None] - centres[None]).abs().argmin(1)
    for i in range(8):
        mine = nearest == i
        mean = (weights.double() * points.double())[mine].sum() / weights.double()[mine].sum()
        assert abs(mean - centres[i]) < 1e-6


def test_no_worse_than_even_and_normal_float_grids() -> None:
    points, weights = random(20000).clamp(-3, 3) / 3, random(20000, seed=1).square()
    found = cost(points, weights, kmeans.fit(points, weights, 8))
    assert found < cost(points, weights, torch.linspace(-1, 1, 8))
    assert found < cost(points, weights, NF3)


def test_pooled_points_give_the_same_centres() -> None:
    points, weights = random(kmeans.EXACT_POINTS + 1), random(kmeans.EXACT_POINTS + 1, seed=1).square()
    pooled = kmeans.fit(points, weights, 8)
    exact = kmeans.fit(points[:-1], weights[:-1], 8)
    assert (pooled - exact).abs().max() < 2e-3
    both = [cost(points, weights, c) for c in (pooled, exact)]
    assert abs(both[0] - both[1]) < 1e-4 * both[0]


def test_few_different_numbers() -> None:
    points = torch.tensor([1.0, 1.0, 5.0, 5.0, 5.0])
    centres = kmeans.fit(points, None, 4)
    assert centres.shape == (4,)
    assert (centres.diff() >= 0).all()
    assert cost(points, torch.ones(5), centres) < 1e-12
    same = kmeans.fit(torch.full((9,), 2.5), None, 2)
    assert torch.allclose(same, torch.full((2,), 2.5).double(), atol=1e-12)


def test_without_any_weight_all_weigh_the_same() -> None:
    points = random(300)
    assert torch.equal(kmeans.fit(points, torch.zeros(300), 4), kmeans.fit(points, None, 4))


def test_tiny_weights_count() -> None:
    points, weights = random(300), random(300, seed=1).square()
    assert torch.allclose(kmeans.fit(points, weights * 1e-30, 4), kmeans.fit(points, weights, 4), atol=1e-5)


def test_nearest_is_the_nearest() -> None:
    centres = kmeans.fit(random(1000), None, 16).float()
    x = random(7, 100, seed=2)
    expected = (x[..., None] - centres).abs().argmin(-1)
    assert torch.equal(kmeans.nearest(x, centres), expected)
