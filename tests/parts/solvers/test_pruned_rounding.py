"""Wider steps and more zeros within a bound of the output error, and rows fitted in the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Group
from kvpack.ops.entropy import entropy
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.solvers.pruned_rounding import PrunedRounding
from tests.contracts.discovery import random, stats_of

CODEC = Affine(bits=8, group=Group("channel", 0), zero="none")


def inputs(tokens: int = 300, channels: int = 64) -> Tensor:
    return random(tokens, channels, seed=1) @ random(channels, channels, seed=2)


def solved(solver: PrunedRounding, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Codes around zero, the weight they stand for, and the relative squared output error."""
    payload = solver.solve(weight, CODEC, stats_of(solver, x)).payload
    decoded = CODEC.decode(payload, {}, torch.float32)
    lost = float(((weight - decoded).double() @ x.double().T).square().sum())
    return payload.tensors["codes"].int() - 128, decoded, lost / float((weight @ x.T).double().square().sum())


def test_without_width_and_zeros_rows_are_rounded_and_fitted() -> None:
    x, weight = inputs(), random(20, 64)
    codes, decoded, _ = solved(PrunedRounding(widths=(1.0,), pruned=(0.0,), step="row"), weight, x)
    step = (weight.abs().amax(-1, keepdim=True) / 127).half().float()
    assert (codes - (weight / step).round()).abs().max() <= 1
    target, found = weight.double() @ x.double().T, codes.double() @ x.double().T
    fitted = (target * found).sum(-1) / found.square().sum(-1)
    assert torch.allclose(decoded, (fitted[:, None] * codes).float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("bound", [1e-4, 1e-3, 1e-2])
def test_the_bound_is_spent_and_kept(bound: float) -> None:
    x, weight = inputs(), random(48, 64)
    plain, _, before = solved(PrunedRounding(error=0.0, widths=(1.0,), pruned=(0.0,)), weight, x)
    codes, _, after = solved(PrunedRounding(error=bound), weight, x)
    assert after <= max(2 * bound, before) * 1.01
    assert entropy((codes + 128).byte()) <= entropy((plain + 128).byte())
    assert (codes == 0).float().mean() >= (plain == 0).float().mean()


def test_more_error_gives_more_zeros_and_less_entropy() -> None:
    x, weight = inputs(), random(48, 64)
    found = [solved(PrunedRounding(error=bound), weight, x)[0] for bound in (1e-5, 1e-3, 3e-2)]
    zeros = [(codes == 0).float().mean().item() for codes in found]
    bits = [entropy((codes + 128).byte()) for codes in found]
    assert zeros == sorted(zeros)
    assert zeros[-1] > 0.1
    assert bits == sorted(bits, reverse=True)


def test_weights_of_strong_channels_are_pruned_last() -> None:
    x = random(300, 64, seed=1)
    x[:, :8] *= 30
    codes, _, _ = solved(PrunedRounding(error=5e-2, widths=(1.0,)), random(48, 64), x)
    zero = codes == 0
    assert zero[:, 8:].float().mean() > 5 * zero[:, :8].float().mean()


def test_zero_rows_and_dead_channels() -> None:
    x, weight = inputs(), random(20, 64)
    x[:, 5] = 0
    weight[3] = 0
    _, decoded, _ = solved(PrunedRounding(), weight, x)
    assert bool(decoded.isfinite().all())
    assert not decoded[3].any()


def test_what_does_not_fit_is_refused() -> None:
    weight, solver = random(20, 64), PrunedRounding()
    with pytest.raises(RecipeError, match="cannot choose codes"):
        solver.solve(weight, Affine(bits=8), stats_of(solver, inputs()))
    with pytest.raises(KvpackError, match="not measured"):
        solver.solve(weight, CODEC, {})


def test_entropy_counts() -> None:
    assert entropy(torch.zeros(100, dtype=torch.uint8)) == 0
    assert entropy(torch.arange(256).byte()) == pytest.approx(8)
    assert entropy(torch.tensor([1, 2, 3, 3], dtype=torch.uint8)) == pytest.approx(1.5)
    assert entropy(torch.empty(0, dtype=torch.uint8)) == 0
