"""Layers that are given the same input are solved as one matrix, to the same codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvpack.calibrate.collect import InputStats
from kvpack.calibrate.solve import solve, solve_all
from kvpack.core.errors import KvpackError
from kvpack.parts.solvers.gptq import Gptq
from kvpack.recipe.plan import WeightPlan
from tests.calibrate.conftest import Job

BLOCK = "model.layers.0"
TOGETHER = [f"{BLOCK}.self_attn.{n}_proj" for n in "qkv"]


def measured(weights: dict[str, WeightPlan]) -> InputStats:
    """Statistics of inputs that q, k and v share and the others do not."""
    inputs = InputStats({n: w.solver.requires() for n, w in weights.items()})
    generator = torch.Generator().manual_seed(0)
    modules = {n: torch.nn.Linear(w.linear.shape[1], 1, device="meta") for n, w in weights.items()}
    for module in modules.values():
        module.forward = lambda x: x
    shared = torch.randn(1, 200, weights[TOGETHER[0]].linear.shape[1], generator=generator)
    with inputs.attached(modules):
        for name, weight in weights.items():
            channels = weight.linear.shape[1]
            modules[name](shared if name in TOGETHER else torch.randn(1, 200, channels, generator=generator))
    return inputs


@pytest.fixture
def weights(job: Job) -> dict[str, WeightPlan]:
    return {n: w for n, w in job.plan.weights.items() if n.startswith(f"{BLOCK}.")}


@pytest.fixture
def sources(weights: dict[str, WeightPlan]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(w.linear.shape, generator=generator) for n, w in weights.items()}


def test_stacked_rows_get_the_codes_of_single_layers(weights, sources, monkeypatch) -> None:
    calls = []
    whole = Gptq.solve

    def spy(self, weight, codec, stats):
        calls.append(len(weight))
        return whole(self, weight, codec, stats)

    monkeypatch.setattr(Gptq, "solve", spy)
    inputs = measured(weights)
    found = dict(solve_all(weights, sources, inputs, torch.float32))
    assert found.keys() == weights.keys()
    assert len(calls) == len(weights) - 2
    for name, weight in weights.items():
        alone = solve(weight, sources[name], inputs.of(name), torch.float32)
        same = alone.solution.tensors["codes"] == found[name].solution.tensors["codes"]
        assert same.float().mean() > 0.99, name
        assert found[name].solution.payload.shape == tuple(weight.linear.shape)
        assert found[name].output_error == pytest.approx(alone.output_error, rel=1e-3)
        torch.testing.assert_close(
            found[name].approximation,
            weight.codec.decode(found[name].solution.payload, {}, torch.float32),
        )


def test_another_codec_or_solver_stays_alone(weights, sources, monkeypatch) -> None:
    odd = {n: replace(w, solver=Gptq(damp=0.1)) if n == TOGETHER[1] else w for n, w in weights.items()}
    inputs = measured(odd)
    found = dict(solve_all(odd, sources, inputs, torch.float32))
    alone = solve(odd[TOGETHER[1]], sources[TOGETHER[1]], inputs.of(TOGETHER[1]), torch.float32)
    assert torch.equal(found[TOGETHER[1]].solution.tensors["codes"], alone.solution.tensors["codes"])


def test_a_layer_that_never_ran_is_named(weights, sources) -> None:
    inputs = InputStats({n: w.solver.requires() for n, w in weights.items()})
    with pytest.raises(KvpackError, match="was never used by its block"):
        dict(solve_all(weights, sources, inputs, torch.float32))
