"""Sparse activations from recipe to artifact to running model, on every kind of FFN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import kvpack
from kvpack import pipeline
from kvpack.artifact.part_checks import check_parts
from kvpack.core.errors import ArtifactError, RecipeError, UsageError
from kvpack.report import weight_bytes
from kvpack.runtime.sparse_modules import SparseFeedForward, SparseLinear
from kvpack.runtime.sparsity import count_anew, every_token_sparse, sparsity_of, start_sparse
from tests.contracts.discovery import random
from tests.recipes.checks import check_everything, same_bits
from tests.recipes.conftest import SMALL, Made, Make, MakeSource

PACKED = "weights=[{match: '@linear', codec: {kind: affine, bits: 8}, solver: {kind: rtn}}]"
BIASED = {"mlp_bias": True, "attention_bias": True}


def as_linear(module: SparseLinear) -> torch.nn.Linear:
    """The plain layer with the same tensors."""
    linear = torch.nn.Linear(1, 1)
    linear.weight, linear.bias = module.weight, module.bias
    return linear


def module_width(module: SparseFeedForward | SparseLinear) -> int:
    return module.in_features if isinstance(module, SparseLinear) else module.gate_proj.in_features


def export(source: Path, recipe: str, out: Path, *overrides: str) -> Made:
    plan = pipeline.make_plan(source, recipe, (*SMALL, *overrides))
    return Made(source, plan, pipeline.export(plan, out).path)


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        ("chess@ffn", "phi3"),
        ("chess@ffn", "gpt_neox"),
        ("teal", "phi3"),
        ("teal", "gpt_neox"),
        ("chess", "qwen2"),
        ("cats", "gemma2"),
    ],
)
def test_other_kinds_of_ffn(recipe: str, family: str, make: Make, prompt: torch.Tensor) -> None:
    check_everything(make(recipe, family), prompt)


@pytest.mark.parametrize("recipe", ["chess", "teal"])
def test_biases(recipe: str, make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor) -> None:
    made = export(make_source("llama", **BIASED), recipe, tmp_path / "out")
    assert "model.layers.0.mlp.up_proj.bias" in made.artifact.tensor_names
    check_everything(made, prompt)


@pytest.mark.parametrize("recipe", ["chess", "teal"])
def test_packed_weights(recipe: str, make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor) -> None:
    made = export(make_source("llama"), recipe, tmp_path / "out", PACKED)
    check_everything(made, prompt)
    skips = {name.rpartition(".")[2]: a.skips for name, a in sparsity_of(made.load()).items()}
    assert skips["q_proj"] == "nothing (masked)"
    assert skips.get("mlp", "packed rows of up") == "packed rows of up"


@pytest.mark.parametrize("recipe", ["chess", "teal"])
def test_keeping_everything_is_the_source_bit_for_bit(
    recipe: str, make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor
) -> None:
    keep = [f"sparsity.inputs.{i}.thresholds.keep_fraction=1.0" for i in range(2 if recipe == "chess" else 1)]
    gate = ["sparsity.gate.keep_fraction=1.0"] if recipe == "chess" else []
    made = export(make_source("llama"), recipe, tmp_path / "out", *keep, *gate)
    source, model = AutoModelForCausalLM.from_pretrained(made.source), made.load()
    with torch.inference_mode(), every_token_sparse(model):
        assert same_bits(model(prompt, use_cache=False).logits, source(prompt, use_cache=False).logits)
        # For one row, BLAS rounds by where a matrix lies in memory, so modules are compared themselves.
        for module in (m for m in model.modules() if isinstance(m, SparseFeedForward | SparseLinear)):
            plain = module._held[0] if isinstance(module, SparseFeedForward) else as_linear(module)
            for x in (random(1, 1, module_width(module)), random(2, 5, module_width(module))):
                assert same_bits(module(x), plain(x))
    assert {a.active for a in sparsity_of(model).values()} == {1.0}


def test_prompts_are_dense_and_rows_of_a_batch_are_masked(make: Make, prompt: torch.Tensor) -> None:
    made = make("chess")
    source, model = AutoModelForCausalLM.from_pretrained(made.source), made.load()
    with torch.inference_mode():
        assert torch.allclose(model(prompt).logits, source(prompt).logits, atol=1e-5)
        assert all(a.seen == 0 and a.active is None for a in sparsity_of(model).values())
        rows = torch.cat((prompt[:, :6], prompt[:, 6:12]))
        one_by_one = []
        for ids in (rows, rows[:1]):
            count_anew(model)
            cache = DynamicCache()
            steps = [model(step, past_key_values=cache).logits for step in ids.split(1, 1)]
            one_by_one.append(torch.cat(steps, 1))
            assert {a.seen for n, a in sparsity_of(model).items() if n.endswith("mlp")} == {len(ids) * 6 * 96}
    assert torch.allclose(one_by_one[0][:1], one_by_one[1], atol=1e-4)


def test_prompts_may_be_sparse_too(make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor) -> None:
    made = export(make_source("llama"), "chess", tmp_path / "out", "sparsity.prefill=masked")
    model = made.load()
    with torch.inference_mode():
        free = model(prompt).logits
        with every_token_sparse(model):
            assert same_bits(free, model(prompt).logits)
    assert all(0 < a.active < 1 for a in sparsity_of(model).values())


def test_sparse_attention_leaves_keys_and_values_alone(make: Make, prompt: torch.Tensor) -> None:
    """Layer 0: the same cache with and without sparse queries and outputs."""
    layers = []
    for recipe in ("chess", "chess@ffn"):
        model = make(recipe).load()
        with torch.inference_mode(), every_token_sparse(model):
            layers.append(model(prompt, use_cache=True).past_key_values.layers)
    assert same_bits(layers[0][0].keys, layers[1][0].keys)
    assert same_bits(layers[0][0].values, layers[1][0].values)
    assert not torch.equal(layers[0][1].keys, layers[1][1].keys)


def test_columns_cost_no_memory(make: Make) -> None:
    """Matrices are laid out column by column in place of row by row; there is no second copy."""
    model = make("chess").load()
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.shape == (64, 96)
    assert down.t().is_contiguous()
    assert down.untyped_storage().nbytes() == down.nbytes


def test_thresholds_take_two_bytes_a_channel(make: Make, make_source: MakeSource) -> None:
    plan = make("chess").plan
    assert sum(spec.nbytes for spec in plan.sparsity.tensors().values()) == 2 * 2 * (96 + 1 + 1)
    dense = sum(t.nbytes for t in plan.copied.values())
    assert weight_bytes(plan).total == dense + 2 * 2 * (96 + 1 + 1)


def test_share_of_the_weights_that_a_token_reads(make: Make) -> None:
    """q and o of 64 x 64, k and v of 32 x 64, gate, up and down of 64 x 96."""
    whole = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    plans = {name: make(name).plan for name in ("chess", "cats", "teal")}
    shares = {name: plan.sparsity.read_share(plan.model.linears) for name, plan in plans.items()}
    assert shares["teal"] == 0.5
    assert shares["cats"] == pytest.approx(1 - 64 * 96 / whole)
    assert shares["chess"] == pytest.approx(1 - (64 * 96 + 64 * 64) / whole)


REFUSED = [
    ("chess", "phi3", (), "queries, keys and values with one matrix"),
    ("chess", "llama", ("sparsity.inputs.0.match=@lm_head",), "no linear layer in the blocks"),
    ("cats", "llama", ("sparsity.gate=null",), "names nothing"),
    ("cats", "llama", ("sparsity.gate.keep_fraction=0",), "out of range"),
]


@pytest.mark.parametrize(("recipe", "family", "overrides", "message"), REFUSED)
def test_what_cannot_be_sparse_is_refused(
    recipe: str, family: str, overrides: tuple[str, ...], message: str, make_source: MakeSource
) -> None:
    with pytest.raises(RecipeError, match=message):
        pipeline.make_plan(make_source(family), recipe, overrides)


def test_experts_are_refused_by_name(make_source: MakeSource) -> None:
    source = make_source("mixtral", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(RecipeError, match=r"experts.*thresholds per expert"):
        pipeline.make_plan(source, "cats")
    pipeline.make_plan(source, "chess", ("sparsity.gate=null",))


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_broken_thresholds_are_refused(value: float, make: Make) -> None:
    model = make("chess").load()
    model.model.layers[1].mlp.threshold[3] = value
    with pytest.raises(ArtifactError, match="negative or not finite"):
        start_sparse(model)


def test_a_manifest_with_other_thresholds_is_refused(make: Make) -> None:
    made = make("chess")
    manifest = made.artifact.manifest
    check_parts(manifest, made.path)
    name = next(iter(manifest.sparsity.sites))
    wide = replace(manifest.sparsity.sites[name], channels=97)
    other = replace(manifest.sparsity, sites={**manifest.sparsity.sites, name: wide})
    for wrong in (
        replace(manifest, sparsity=other),
        replace(manifest, sparsity=None),
        replace(manifest, thresholds={}),
    ):
        with pytest.raises(ArtifactError, match="thresholds are not those of its sites"):
            check_parts(wrong, made.path)


def test_a_model_without_sparse_activations_says_so(make: Make) -> None:
    with pytest.raises(UsageError, match="no sparse activations"):
        sparsity_of(make("w8").load())


def test_calibrated_shares_are_in_the_manifest(make: Make) -> None:
    """Measured with everything before them sparse; 128 tokens of noise leave much to chance."""
    sites = make("teal").artifact.manifest.sparsity.sites
    assert len(sites) == 14
    assert all(site.active == pytest.approx(0.5, abs=0.03) for site in sites.values())


def test_it_generates_in_bfloat16(make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor) -> None:
    made = export(make_source("llama", dtype="bfloat16"), "chess", tmp_path / "out")
    model = kvpack.load(made.path)
    model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for name, activity in sparsity_of(model).items():
        assert activity.seen == 3 * model.get_submodule(name).gate.site.channels
        assert 0 < activity.active < 1  # outputs of attention shrink as contexts grow: far from calibrated
