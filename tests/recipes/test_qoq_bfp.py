"""Scaled, sorted and folded keys: exact without quantisation, and the cards' bits with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvpack
from kvpack import pipeline
from kvpack.artifact.reader import Artifact
from kvpack.calibrate.hooks import Tap
from kvpack.core.errors import RecipeError
from kvpack.models.scan import scan
from kvpack.report import kv_bytes, kv_bytes_per_token
from kvpack.runtime.install import new_cache
from kvpack.verify import verify
from tests.recipes.checks import folded_names, same_bits
from tests.recipes.conftest import SMALL, Make, MakeSource
from tests.tiny_models import FAMILIES

UNQUANTISED = """
kvpack: 1
name: unquantised
extends: {base}
kv_cache:
  tiers:
    old: {{codec: {{kind: identity}}}}
"""
NORMED = ("qwen3", "gemma3_text")
ALL = (*FAMILIES, "stablelm", "phi")
RECIPES = ("qoq-kv4", "bfp", "bfp@calibrated", "bfp@sorted-values")

Exported = Callable[[str, str], tuple[PreTrainedModel, PreTrainedModel]]


@pytest.fixture(scope="module")
def unquantised(tmp_path_factory: pytest.TempPathFactory, make_source: MakeSource) -> Exported:
    """The source, and its export by a recipe without its codec."""
    root, made = tmp_path_factory.mktemp("unquantised"), {}

    def get(base: str, family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
        source = make_source(family)
        if (base, family) not in made:
            recipe = root / f"{base}.yaml"
            recipe.write_text(UNQUANTISED.format(base=base))
            plan = pipeline.make_plan(source, str(recipe), SMALL)
            made[base, family] = pipeline.export(plan, root / f"{base}-{family}").path
        return AutoModelForCausalLM.from_pretrained(source).eval(), kvpack.load(made[base, family])

    return get


def agree(source: PreTrainedModel, model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Without a cache, from a decoded prompt, and token by token."""
    with torch.inference_mode():
        expected = source(tokens, use_cache=False).logits
        plain = model(tokens, use_cache=False).logits
        decoded = model(tokens, past_key_values=new_cache(model, exact_prefill=False), use_cache=True).logits
        cache = new_cache(model)
        pieces = tokens.split((20, *[1] * (tokens.shape[1] - 20)), dim=1)
        steps = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    assert cache.stored_tokens > 0
    for found in (plain, decoded, torch.cat(steps, 1)):
        assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ALL)
def test_smooth_attention_without_quantisation_changes_nothing(
    family: str, unquantised: Exported, prompt: torch.Tensor
) -> None:
    source, model = unquantised("qoq-kv4", family)
    agree(source, model, prompt[:, :40])
    before, after = source.state_dict(), model.state_dict()
    changed = {n.split(".")[-2] for n in after if n in before and not same_bits(after[n], before[n])}
    fused = {"phi3": {"qkv_proj"}, "gpt_neox": {"query_key_value"}}
    assert changed == (set() if family in NORMED else fused.get(family, {"q_proj", "k_proj"}))


@pytest.mark.parametrize("recipe", RECIPES[1:])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_sorting_without_quantisation_changes_nothing(
    recipe: str, family: str, unquantised: Exported, prompt: torch.Tensor
) -> None:
    agree(*unquantised(recipe, family), prompt[:, :40])


def test_the_folded_cache_holds_flatter_keys(unquantised: Exported, prompt: torch.Tensor) -> None:
    """What is stored is k / lambda, where lambda is the root of the largest |k| seen."""
    source, model = unquantised("qoq-kv4", "llama")
    exact: list[torch.Tensor] = []
    stored: list[torch.Tensor] = []
    cache = new_cache(model, exact_prefill=False)
    update = cache.layers[0].update

    def watched(*args: Any, **kwargs: Any) -> Any:
        held = update(*args, **kwargs)
        stored.append(held[0].float())
        return held

    cache.layers[0].update = watched
    with torch.inference_mode():
        source(prompt, past_key_values=Tap(lambda key, _: exact.append(key)), use_cache=True)
        model(prompt, past_key_values=cache, use_cache=True)
    factor = exact[0] / stored[0]
    factor = factor.median(2, keepdim=True).values
    assert torch.allclose(exact[0], factor * stored[0], atol=1e-3)
    assert torch.allclose(factor[..., :8], factor[..., 8:], rtol=1e-3)
    peak = exact[0].abs().amax((0, 2))
    tied = torch.maximum(peak, peak.roll(8, -1)).sqrt()
    assert (factor[0, :, 0] / tied).log().abs().max() < 0.5  # other tokens than the calibration's


@pytest.mark.parametrize("recipe", ["qoq-kv4", "bfp@sorted-values"])
def test_calibrating_together_gives_the_same_states(
    recipe: str, make: Make, make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source("llama")
    plans = [pipeline.make_plan(source, name, SMALL) for name in (recipe, "bfp@calibrated")]
    folders = pipeline.calibrate_together(plans, tmp_path, hashes=scan(plans[0].model))
    made = pipeline.export(plans[0], tmp_path / "out", calibration=folders[0])
    alone = make(recipe, "llama")
    together = Artifact.open(made.path)
    for name in alone.artifact.tensor_names:
        assert torch.allclose(together.read(name), alone.artifact.read(name), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("recipe", ["qoq-kv4", "bfp@sorted-values"])
def test_folded_weights_are_proven_against_the_source(recipe: str, make: Make) -> None:
    made = make(recipe, "phi3")
    assert all(check.passed for check in verify(made.path, made.source).checks)


def test_normed_keys_are_scaled_online_and_the_plan_says_so(make: Make) -> None:
    plan = make("qoq-kv4", "qwen3").plan
    assert not any(layer.key.folded for layer in plan.kv)
    assert folded_names(plan) == set()
    assert any("not folded" in note and "norm" in note for note in plan.notes)
    folded = make("qoq-kv4", "llama").plan
    assert all(layer.key.folded for layer in folded.kv)
    assert folded.notes == ()


def test_what_rope_does_not_let_pass_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    recipe = tmp_path / "rotated.yaml"
    recipe.write_text(
        UNQUANTISED.format(base="kivi") + "  key: {transforms: [{kind: hadamard}], fold: true}\n"
    )
    with pytest.raises(RecipeError, match=r"hadamard.*cannot be folded into the key projection"):
        pipeline.make_plan(make_source("llama"), str(recipe), ())


@pytest.mark.parametrize(
    ("recipe", "mantissa", "block"),
    [("bfp", 4, 32), ("bfp@n16", 4, 16), ("bfp@n64", 4, 64), ("bfp@bfp16", 8, 32)],
)
def test_block_float_takes_the_cards_bits(
    recipe: str, mantissa: int, block: int, make_source: MakeSource
) -> None:
    source = make_source("llama", head_dim=128)
    plan = pipeline.make_plan(source, recipe, SMALL)
    held = kv_bytes(plan.kv, 1000, "float16")
    assert 8 * held.coded / held.elements == mantissa + 8 / block
    assert held.bits_per_element == pytest.approx(mantissa + 8 / block, rel=0.01)


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize(("recipe", "bits"), [("qoq-kv4", 4), ("qoq-kv4@kv8", 8), ("qoq-kv4@no-smooth", 4)])
def test_qoq_takes_the_cards_bits(recipe: str, bits: int, width: int, make_source: MakeSource) -> None:
    plan = pipeline.make_plan(make_source("llama", head_dim=width), recipe, SMALL)
    per_token = float(kv_bytes_per_token(plan.kv, "float16"))
    assert 8 * per_token / (2 * 2 * 2 * width) == bits + 32 / width
