"""Experts are calibrated by the tokens that are routed to them, cold ones by all of their layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvpack.calibrate import sequential
from kvpack.calibrate.collect import InputStats
from kvpack.calibrate.experts import FEWEST_TOKENS
from kvpack.calibrate.solve import solve_all
from kvpack.calibrate.store import Calibration
from kvpack.core.types import Stat
from kvpack.models.experts import Expert, Experts
from tests.calibrate.conftest import Job, job_for
from tests.tiny_models import MOE_FAMILIES, make_model

TOKENS = ("calibration.samples=16", "calibration.sample_tokens=64")
COLD = 3


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("moe") / "model"
    changes = (*TOKENS, "calibration.sequential=false")
    return job_for(make_model(folder, request.param, cold_expert=COLD), "w4", *changes)


@dataclass(frozen=True)
class Done:
    """A calibration, and the Gram matrices that its layers were solved with."""

    calibration: Calibration
    grams: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def done(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Done:
    grams: dict[str, torch.Tensor] = {}

    def spy(weights, sources, inputs, dtype):
        grams.update({name: inputs.of(name)["gram"]["gram"].clone() for name in weights})
        return solve_all(weights, sources, inputs, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequential, "solve_all", spy)
        return Done(job.run(tmp_path_factory.mktemp("done") / "calibration"), grams)


@torch.no_grad()
def _routed(job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    """What the experts of block 0 are given in plain transformers: tokens, chosen experts; the module."""
    model = AutoModelForCausalLM.from_pretrained(job.plan.model.path, dtype=torch.float32).eval()
    experts, seen = model.model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda m, args: seen.append(args[:2]))
    for part in job.samples.tokens.split(4):
        model(part)
    return torch.cat([x for x, _ in seen]), torch.cat([chosen for _, chosen in seen]), experts


@torch.no_grad()
def _expected(job: Job) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Gram matrices of block 0's experts, computed directly, and tokens per expert."""
    hidden, chosen, fused = _routed(job)
    grams: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}
    for index in range(4):
        own = (chosen == index).any(1)
        name = f"model.layers.0.mlp.experts.{index}"
        tokens[name] = int(own.sum())
        x = hidden if tokens[name] < FEWEST_TOKENS else hidden[own]
        gate, up = (x @ fused.gate_up_proj[index].T).chunk(2, -1)
        middle = torch.nn.functional.silu(gate) * up
        grams |= {f"{name}.{side}_proj": x.T @ x for side in ("gate", "up")}
        grams[f"{name}.down_proj"] = middle.T @ middle
    return grams, tokens


def test_statistics_are_those_of_routed_tokens(job: Job, done: Done) -> None:
    grams, tokens = _expected(job)
    assert tokens[f"model.layers.0.mlp.experts.{COLD}"] == 0
    assert min(n for name, n in tokens.items() if not name.endswith(f".{COLD}")) >= FEWEST_TOKENS
    for name, gram in grams.items():
        assert (done.grams[name] - gram).abs().max() <= 1e-4 * gram.abs().max(), name


def test_cold_experts_are_reported(job: Job, done: Done) -> None:
    _, tokens = _expected(job)
    stored = json.loads((done.calibration.path / "calibration.json").read_text())["experts"]
    assert {n: t for n, t in stored["tokens"].items() if ".layers.0." in n} == tokens
    assert sum(stored["tokens"].values()) == 2 * 2 * 16 * 64, "two experts per token in two layers"
    cold = {name: count for name, count in stored["tokens"].items() if count < FEWEST_TOKENS}
    assert cold.keys() >= {f"model.layers.{layer}.mlp.experts.{COLD}" for layer in range(2)}
    assert len(cold) < 8
    assert done.calibration.experts == {"measured": 8, "fewest_tokens": FEWEST_TOKENS, "cold": cold}
    assert done.calibration.origin["experts"] == done.calibration.experts


def test_cold_experts_are_solved_like_others(job: Job, done: Done) -> None:
    errors = done.calibration.output_errors
    assert set(errors) == set(job.plan.weights)
    cold = [e for name, e in errors.items() if f".experts.{COLD}." in name]
    assert len(cold) == 6
    assert all(0 < e < 0.2 for e in errors.values())
    for name in job.plan.weights:
        solved = done.calibration.solved(name)
        assert solved is not None
        assert all(bool(t.isfinite().all()) for t in solved.values() if t.is_floating_point())


def test_models_without_experts_say_nothing_of_them(checkpoint, tmp_path: Path) -> None:
    made = job_for(checkpoint("llama"), "w4").run(tmp_path / "c")
    assert made.experts == {}
    assert "experts" not in made.manifest
    assert "experts" not in made.origin


@torch.no_grad()
def test_experts_that_are_shown_all_tokens() -> None:
    """They see each token once, do not share inputs, and the layer's output is what it was."""
    generator = torch.Generator().manual_seed(0)
    layer = Experts(Expert(4, 6, torch.nn.functional.silu, torch.empty(3, 4, 6)) for _ in range(3))
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(50, 4, generator=generator)
    chosen = torch.tensor([[0, 1]] * 45 + [[0, 2]] * 4 + [[0, 3]])
    weights = torch.rand(50, 2, generator=generator)
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    found = []
    for shown in (frozenset(), frozenset({2})):
        layer.shown_all = shown
        inputs = InputStats({n: frozenset({Stat("gram")}) for n in linears})
        with inputs.attached(linears):
            found.append((layer(x, chosen, weights), inputs))
    (plain, own), (same, whole) = found
    assert torch.allclose(plain, same, atol=1e-6)
    counts = [{n: int(i.of(n)["gram"]["count"]) for n in linears} for i in (own, whole)]
    assert [counts[0][f"{i}.down_proj"] for i in range(3)] == [50, 45, 4]
    assert [counts[1][f"{i}.up_proj"] for i in range(3)] == [50, 45, 50]
    assert torch.allclose(whole.of("2.gate_proj")["gram"]["gram"], x.T @ x, rtol=1e-5)
    assert whole.leader("2.up_proj") == "2.gate_proj"
