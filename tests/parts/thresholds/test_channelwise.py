"""Thresholds per channel, computed again directly: quantiles of all importances, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpack.calibrate.stats import accumulator
from kvpack.core.roles.sparsity import NEVER
from kvpack.core.types import Stats
from kvpack.ops.thresholds import masked
from kvpack.parts.thresholds.channelwise import Channelwise
from kvpack.parts.thresholds.magnitude import Magnitude
from tests.contracts.discovery import random

WIDTHS = [48, 64, 80, 172]


def measured(gate: Tensor, up: Tensor | None, down: Tensor) -> Stats:
    found = {"consumers.weight": {"weight": down}}
    for name, kind, x in (
        ("magnitudes", "magnitudes", gate),
        ("factor.channel_magnitude", "channel_magnitude", up),
    ):
        if x is not None:
            statistic = accumulator(kind)
            statistic.update(x[None, None])
            found[name] = statistic.state()
    return found


def ffn(width: int, tokens: int = 600) -> tuple[Tensor, Tensor, Tensor]:
    """Activated gate and up [T, I] whose channels differ in size, and a down projection [C, I]."""
    gate = torch.nn.functional.silu(random(tokens, width, seed=1) * torch.linspace(0.5, 2, width))
    up = random(tokens, width, seed=2) * torch.logspace(-1, 1, width)[torch.arange(width) * 7 % width]
    return gate, up, random(24, width, seed=3)


def quantile(numbers: Tensor, keep: float) -> float:
    ranked = numbers.double().flatten().sort().values
    return float(ranked[int(len(ranked) * (1 - keep))])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("column_norms", [False, True])
def test_thresholds_are_the_quantile_of_importances_over_the_factor(
    width: int, keep: float, column_norms: bool
) -> None:
    gate, up, down = ffn(width)
    factor = up.double().abs().mean(0) * (down.double().norm(dim=0) if column_norms else 1)
    expected = quantile(gate.abs() * factor, keep) / factor
    part = Channelwise(keep, column_norms)
    found = part.fit(measured(gate, up, down))["threshold"]
    # A bin is 9 % wide and interpolated; bfloat16 rounds by up to 0.4 %.
    assert torch.allclose(found.double(), expected, rtol=0.03)
    assert float((masked(gate, found) != 0).float().mean()) == pytest.approx(keep, abs=0.01)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("keep", [0.7, 0.5, 0.3])
def test_the_output_is_nearer_than_with_one_threshold(width: int, keep: float) -> None:
    gate, up, down = ffn(width)
    exact = (gate * up) @ down.T
    errors = []
    for part in (Channelwise(keep), Magnitude(keep)):
        kept = masked(gate, part.fit(measured(gate, up, down))["threshold"])
        errors.append(float(((kept * up) @ down.T - exact).norm() / exact.norm()))
    assert errors[0] < errors[1]


def test_channels_that_never_mattered_are_never_kept_and_count_as_left_out() -> None:
    gate, up, down = ffn(64)
    up[:, 5:15] = 0
    found = Channelwise(0.5).fit(measured(gate, up, down))["threshold"]
    assert (found[5:15].float() > 2.9e38).all()
    assert (found[15:].float() < 1e3).all()
    assert NEVER > 2.9e38
    assert float((masked(gate, found) != 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_channels_that_hardly_mattered_have_a_finite_threshold() -> None:
    gate, up, down = ffn(64)
    up[:, 3] = 1e-30
    found = Channelwise(0.5).fit(measured(gate, up, down))["threshold"]
    assert found[3].isfinite()
    assert found[3] < 1e9 * found.float().median()


def test_nothing_ever_mattered() -> None:
    gate, up, down = ffn(48)
    found = Channelwise(0.5).fit(measured(gate, torch.zeros_like(up), down))["threshold"]
    assert (masked(gate, found) == 0).all()


def test_without_a_factor_the_columns_decide() -> None:
    """Non-gated FFNs, and inputs of linear layers: |x_i| times the norm of column i."""
    gate, _, down = ffn(80)
    down = down * torch.logspace(-1, 1, 80)
    norms = down.double().norm(dim=0)
    found = Channelwise(0.4).fit(measured(gate, None, down))["threshold"]
    assert torch.allclose(found.double(), quantile(gate.abs() * norms, 0.4) / norms, rtol=0.03)


def test_zeros_are_left_out_first() -> None:
    """ReLU: more zeros than may be left out; nothing that is not zero is lost."""
    gate, up, down = ffn(64)
    gate = torch.where(random(600, 64, seed=4) > 0.8, gate.abs() + 0.01, 0.0)
    for part in (Channelwise(0.5), Magnitude(0.5)):
        found = part.fit(measured(gate, up, down))["threshold"]
        assert torch.equal(masked(gate, found), gate)
        assert (found > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    gate, up, down = ffn(64)
    half = Channelwise(0.5).fit(measured(gate.to(dtype), up.to(dtype), down))["threshold"]
    full = Channelwise(0.5).fit(measured(gate, up, down))["threshold"]
    assert torch.allclose(half.float(), full.float(), rtol=0.03)
    assert masked(gate.to(dtype), half).dtype == dtype
