"""Weighted output errors, against the tokens themselves in float64."""

from __future__ import annotations

import pytest
import torch

from kvpack.core.errors import KvpackError
from kvpack.parts.allocators.output_error import OutputError
from tests.contracts.discovery import random


def statistics(x: torch.Tensor, gradient: torch.Tensor) -> dict:
    return {
        "gram": {"gram": x.T @ x, "count": torch.tensor(len(x))},
        "output_gradient.channel_square": {
            "squares": gradient.double().square().sum(0)[None],
            "count": torch.tensor(len(gradient)),
        },
    }


@pytest.mark.parametrize(("rows", "channels"), [(5, 48), (1, 80), (7, 172)])
def test_losses(rows: int, channels: int) -> None:
    x, gradient = random(64, channels), random(64, rows, seed=1)
    x[:, 3] = 0
    weight = random(rows, channels, seed=2)
    weight[0] = 0
    near = (weight + 0.1 * random(rows, channels, seed=3)).bfloat16().float()
    stats = statistics(x, gradient)
    errors = (x.double() @ (weight - near).double().T).square().mean(0)
    felt = gradient.double().square().mean(0)
    outputs = (x.double() @ weight.double().T).square().mean(0)
    expected = {
        "gradient": float((felt * errors).sum()) / 2,
        "none": float(errors.sum()),
        "output": float(errors.sum() / outputs.sum()) if outputs.sum() > 0 else 0.0,
    }
    for weight_by, loss in expected.items():
        found = OutputError(weight_by=weight_by).loss(weight, near, stats)
        assert found == pytest.approx(loss, rel=1e-4, abs=1e-9)


def test_it_estimates_the_divergence_of_a_softmax() -> None:
    """One layer that makes logits: half the weighted square is the KL divergence, for small errors."""
    x, weight = random(20_000, 12), 0.5 * random(6, 12, seed=1)
    near = weight + 0.02 * random(6, 12, seed=2)
    exact = (x @ weight.T).log_softmax(-1)
    drawn = torch.multinomial(exact.exp(), 1, generator=torch.Generator().manual_seed(3))
    gradient = exact.exp() - torch.nn.functional.one_hot(drawn[:, 0], 6)
    kl = float((exact.exp() * (exact - (x @ near.T).log_softmax(-1))).sum(-1).mean())
    found = OutputError().loss(weight, near, statistics(x, gradient))
    # Outputs are taken for independent, which those of a softmax are not quite.
    assert kl == pytest.approx(found, rel=0.35)


def test_missing_statistics_are_named() -> None:
    with pytest.raises(KvpackError, match="gram"):
        OutputError().loss(random(2, 3), random(2, 3), {})
