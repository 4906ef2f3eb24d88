"""Distances of output distributions, against the outputs themselves in float64."""

from __future__ import annotations

import pytest
import torch

from kvpack.core.errors import KvpackError
from kvpack.core.types import Group
from kvpack.parts.allocators.distribution_distance import DistributionDistance
from kvpack.parts.codecs.affine import Affine
from tests.contracts.discovery import random, stats_of

PART = DistributionDistance()


def distance(x: torch.Tensor, weight: torch.Tensor, near: torch.Tensor) -> float:
    exact, moved = (x.double() @ w.double().T for w in (weight, near))
    means = (exact.mean(0) - moved.mean(0)).norm()
    variances = (exact.var(0, correction=0) - moved.var(0, correction=0)).norm()
    return float(means + variances) / len(weight)


@pytest.mark.parametrize(("rows", "channels"), [(5, 48), (1, 80), (9, 172)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distances(rows: int, channels: int, bits: int) -> None:
    x = random(300, channels) * 3 + 5  # a mean that dwarfs the spread
    x[:, 7] = 0
    weight = random(rows, channels, seed=2)
    weight[0] = 0.5
    codec = Affine(bits=bits, group=Group("channel", 64), zero="integer")
    near = codec.decode(codec.encode(weight, {}), {}, torch.float32)
    found = PART.loss(weight, near, stats_of(PART, x))
    assert found == pytest.approx(distance(x, weight, near), rel=2e-3, abs=1e-5)


def test_more_bits_are_closer() -> None:
    x, weight = random(400, 64), random(24, 64, seed=1)
    stats = stats_of(PART, x)
    losses = []
    for bits in (2, 4, 8):
        codec = Affine(bits=bits, group=Group("channel", 32))
        losses.append(PART.loss(weight, codec.decode(codec.encode(weight, {}), {}, torch.float32), stats))
    assert losses == sorted(losses, reverse=True)


def test_missing_statistics_are_named() -> None:
    with pytest.raises(KvpackError, match="the sum and the Gram matrix"):
        PART.loss(random(2, 3), random(2, 3), {})
