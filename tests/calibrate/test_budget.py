"""Budgets of bits: where they land, what they are spent by, what is remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvpack.calibrate import budget as module
from kvpack.calibrate.sensitivity import sensitivities
from kvpack.core.errors import RecipeError
from kvpack.parts.allocators.output_error import OutputError
from kvpack.pipeline import export, make_plan
from kvpack.recipe.budget import Options
from kvpack.recipe.load import from_resolved, load
from kvpack.recipe.plan import Plan
from kvpack.recipe.resolve import resolve
from kvpack.report import weight_bytes
from tests.calibrate.conftest import job_for
from tests.tiny_models import make_model

SMALL = (
    "calibration.samples=3",
    "calibration.sample_tokens=24",
    "weights.0.codec.group.size=32",
)


@pytest.fixture
def planned(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Plan]:
    """Plans of a tiny model with a budget; measured once per test."""

    def make(*overrides: str, recipe: str = "rtn", family: str = "llama") -> Plan:
        return make_plan(checkpoint(family), recipe, [*SMALL, *overrides], cache=tmp_path / "cache")

    return make


def widths(plan: Plan) -> dict[str, int]:
    return dict(plan.recipe.recipe.budget.bits)


@pytest.mark.parametrize("target", [3.0, 3.6, 5.0, 7.3])
def test_packed_bits_land_within_a_percent_below(planned: Callable[..., Plan], target: float) -> None:
    plan = planned(f"budget.target_bpw={target}", "budget.counts=packed")
    assert 0.99 * target <= weight_bytes(plan).packed_bits <= target
    assert plan.notes == ()


@pytest.mark.parametrize("match", ["@linear", "@all"])
def test_everything_counts(planned: Callable[..., Plan], match: str) -> None:
    change = f"weights.0.match='{match}'"
    free = weight_bytes(planned(change))
    target = int(free.total * 1.07)
    plan = planned(change, f"budget.target_bytes={target}")
    assert 0.99 * target <= sum(t.nbytes for t in plan.artifact_tensors().values()) <= target
    bits = 8 * target / free.parameters
    same = planned(change, f"budget.target_bpw={bits + 1e-9:.12f}")
    assert widths(same) == widths(plan)


def test_an_artifact_takes_what_was_planned(planned: Callable[..., Plan], tmp_path: Path) -> None:
    target = 8 * 10**4
    plan = planned(f"budget.target_bytes={target}", "weights.0.match='@all'")
    made = export(plan, tmp_path / "out")
    assert 0.99 * target <= made.manifest.totals.weight_bytes <= target
    assert made.manifest.resolved_recipe["budget"]["bits"] == widths(plan)
    again = from_resolved(made.manifest.resolved_recipe, "f", "", None)
    assert again.sha256 == plan.recipe.sha256
    assert resolve(again, plan.model).weights == plan.weights


def test_a_resolved_recipe_needs_no_measurement(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("budget.target_bpw=4", "budget.counts=packed")
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(plan.recipe.resolved))
    monkeypatch.setattr(module, "sensitivities", None)
    again = make_plan(plan.model.path, str(path))
    assert (again.weights, again.recipe.sha256) == (plan.weights, plan.recipe.sha256)


def test_another_target_measures_nothing(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = planned("budget.target_bpw=4", "budget.counts=packed")
    monkeypatch.setattr(module, "sensitivities", None)
    planned("budget.target_bpw=5", "budget.counts=packed", "budget.scope=block")
    assert widths(planned("budget.target_bpw=4", "budget.counts=packed")) == widths(first)
    with pytest.raises(TypeError):  # another allocator would have to be measured
        planned(
            "budget.target_bpw=4", "budget.counts=packed", "budget.allocator={kind: distribution_distance}"
        )


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff", None])
def test_damaged_memory_is_measured_again(
    planned: Callable[..., Plan], tmp_path: Path, damage: bytes | None
) -> None:
    first = planned("budget.target_bpw=4", "budget.counts=packed")
    (path,) = (tmp_path / "cache").rglob("*.json")
    sound = path.read_bytes()
    if damage is None:  # one number is another
        stored = json.loads(sound)
        next(iter(stored["losses"].values()))["2"] = 1e9
        damage = json.dumps(stored).encode()
    path.write_bytes(damage)
    assert widths(planned("budget.target_bpw=4", "budget.counts=packed")) == widths(first)
    assert path.read_bytes() == sound


def test_a_folder_that_cannot_be_written_does_not_matter(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    overrides = [*SMALL, "budget.target_bpw=4", "budget.counts=packed"]
    plan = make_plan(checkpoint("llama"), "rtn", overrides, cache=tmp_path / "file")
    assert plan.recipe.recipe.budget.bits


def test_blocks_keep_to_their_shares(planned: Callable[..., Plan]) -> None:
    plan = planned("budget.target_bpw=4.3", "budget.counts=packed", "budget.scope=block")
    used = elements = 0
    for layer in range(len(plan.model.blocks)):
        inside = [w for w in plan.weights.values() if w.linear.layer == layer]
        used += sum(w.nbytes for w in inside)
        elements += sum(w.linear.shape[0] * w.linear.shape[1] for w in inside)
        assert used <= 4.3 * elements / 8


def test_what_cannot_be_met_says_the_floor(planned: Callable[..., Plan]) -> None:
    with pytest.raises(RecipeError, match="cannot be met: with every layer at its smallest") as caught:
        planned("budget.target_bpw=3")
    assert "@all" in caught.value.hint
    with pytest.raises(RecipeError, match="cannot be met"):
        planned("budget.target_bpw=2.1", "budget.counts=packed")


def test_more_than_the_widest_is_a_note(planned: Callable[..., Plan]) -> None:
    plan = planned("budget.target_bpw=12", "budget.counts=packed")
    assert set(widths(plan).values()) == {8}
    assert "largest of budget.widths" in plan.notes[-1]


def test_few_layers_are_a_note(planned: Callable[..., Plan]) -> None:
    change = ("weights.0.match=layers.0.self_attn.q_proj", "budget.counts=packed")
    plan = planned("budget.target_bpw=3.9", *change)
    assert "one more step takes 512 bytes or more" in plan.notes[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("budget.target_bpw=3", "budget.target_bytes=9"), "both given"),
        (("budget.target_bytes=9", "budget.counts=packed"), "counts all"),
        (("budget.widths=[]",), "names no width"),
        (("budget.widths=[3, 3]",), "one of them twice"),
    ],
)
def test_contradictions(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load("rtn", overrides)


def test_stray_layers_and_widths_are_refused(planned: Callable[..., Plan]) -> None:
    with pytest.raises(RecipeError, match="is no packed layer"):
        planned("budget.bits={nowhere: 3}")
    with pytest.raises(RecipeError, match="cannot have 9 bits"):
        planned("budget.bits={model.layers.0.self_attn.q_proj: 9}")
    with pytest.raises(RecipeError, match="no packed layer can have"):
        planned("budget.target_bpw=5", "weights.0.codec={kind: block_float}")


def test_sensitivities_are_those_of_the_whole_model(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Gram matrices and gradients of one backward pass through the model as transformers runs it."""
    from transformers import AutoModelForCausalLM

    overrides = (
        *SMALL,
        "weights.0.match='@all'",
        "budget.target_bpw=5",
        "budget.counts=packed",
        "budget.rounding=nearest",
    )
    job = job_for(checkpoint("llama"), "rtn", *overrides)
    budget = job.plan.recipe.recipe.budget
    options = Options.of(job.plan, budget)
    found = sensitivities(options, budget, job.samples.tokens, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float64)
    seen: dict[str, list[torch.Tensor]] = {}
    for name in job.plan.weights:
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.__setitem__(name, [args[0], out])
        )
    tokens = job.samples.tokens
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    for name, weight in job.plan.weights.items():
        matrix = model.get_submodule(name).weight.detach().float()
        gradient = torch.autograd.grad(loss, seen[name][1], retain_graph=True)[0].flatten(0, 1)
        for bits, codec in options.codecs[name].items():
            near = codec.decode(codec.encode(matrix, {}), {}, torch.float32)
            x = seen[name][0]
            error = (
                (near - matrix)[x] if weight.linear.role == "embedding" else x @ (near - matrix).double().T
            )
            moved = error.detach().double().flatten(0, 1)
            # The last token of a sample predicts nothing, and reaches no head here.
            count = len(gradient) if weight.linear.role != "lm_head" else tokens.numel() - len(tokens)
            kept = moved if weight.linear.role != "lm_head" else error.detach()[:, :-1].flatten(0, 1).double()
            expected = float((gradient.square().sum(0) / count * kept.square().mean(0)).sum()) / 2
            assert found[name][bits] == pytest.approx(expected, rel=2e-3), (name, bits)


@pytest.mark.parametrize(
    "allocator", ["{kind: output_error, weight_by: output}", "{kind: distribution_distance}"]
)
@pytest.mark.parametrize("rounding", ["nearest", "solver", "solver_once"])
def test_other_allocators_and_solvers(planned: Callable[..., Plan], allocator: str, rounding: str) -> None:
    plan = planned(
        "budget.target_bpw=4",
        "budget.counts=packed",
        f"budget.allocator={allocator}",
        f"budget.rounding={rounding}",
        recipe="gptq",
    )
    assert 3.96 <= weight_bytes(plan).packed_bits <= 4


def test_tied_embeddings_count_twice_in_loss_and_once_in_bytes(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tied", tied=True)
    overrides = [*SMALL, "weights.0.match='@all'", "budget.target_bpw=5"]
    plan = make_plan(folder, "rtn", overrides, cache=tmp_path / "cache")
    assert "model.embed_tokens" in widths(plan)
    assert 4.95 <= weight_bytes(plan).bits_per_weight <= 5


def test_the_default_allocator_weighs_by_gradients() -> None:
    assert load("rtn", ["budget.target_bpw=3"]).recipe.budget.allocator == OutputError()
