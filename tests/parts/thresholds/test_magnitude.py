"""One threshold for all channels."""

from __future__ import annotations

import pytest
import torch

from kvpack.ops.thresholds import BINS, HIGHEST, LOWEST, histogram, masked
from kvpack.parts.thresholds.magnitude import Magnitude
from tests.contracts.discovery import fitted, random


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.3, 0.1])
@pytest.mark.parametrize("width", [48, 80, 172])
def test_it_is_the_quantile(keep: float, width: int) -> None:
    x = random(500, width) * torch.linspace(0.1, 2, width)
    ranked = x.double().abs().flatten().sort().values
    expected = float(ranked[int(len(ranked) * (1 - keep))])
    assert float(fitted(Magnitude(keep), x)["threshold"]) == pytest.approx(expected, rel=0.03)


def test_what_reaches_the_threshold_is_kept() -> None:
    x = torch.tensor([0.5, -0.5, 0.25, -2.0, 0.0, float("nan")])
    kept = masked(x, torch.tensor([0.5]).bfloat16())
    assert kept.tolist() == [0.5, -0.5, 0.0, -2.0, 0.0, 0.0]


def test_a_threshold_of_zero_keeps_everything_bit_for_bit() -> None:
    x = random(20, 30)
    x[0, 0] = -0.0
    assert torch.equal(masked(x, torch.zeros(1)).view(torch.int32), x.view(torch.int32))
    assert float(fitted(Magnitude(1.0), x)["threshold"]) == 0


def test_bins_of_extreme_numbers() -> None:
    x = torch.tensor([[0.0, 1e-30, 2.0**LOWEST, 1.0, 2.0**HIGHEST, 1e30, float("inf"), float("nan")]])
    places = histogram(x).argmax(-1).tolist()
    assert places == [0, 0, 1, 1 - LOWEST * 8, BINS, BINS, BINS, BINS]
    assert (histogram(x).sum(-1) == 1).all()
