"""Cached inputs from recipe to artifact: bases, packed projections, refusals by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import kvpack
from kvpack import pipeline
from kvpack.artifact.manifest import Manifest
from kvpack.artifact.part_checks import check_parts
from kvpack.core.errors import ArtifactError, RecipeError
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plan import Plan
from kvpack.report import kv_bytes_per_token
from kvpack.runtime.install import new_cache
from tests.recipes.checks import check_everything
from tests.recipes.conftest import Make, MakeSource

IDENTITY = ("kv_cache.tiers.old.key={kind: identity}", "kv_cache.tiers.old.value={kind: identity}")
BASE = "kv_cache.inputs.difference.base={kind: identity}"
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
"""64 input channels, 32 of keys and values together: as in Llama-3, inputs are the wider ones."""


def bits(plan: Plan, tokens: int = 128) -> float:
    elements = sum(2 * x.attention.kv_heads * x.attention.head_dim for x in plan.kv)
    return 8 * float(kv_bytes_per_token(plan.kv, plan.model.dtype)) / elements


def test_the_basis_follows_from_the_widths(make_source: MakeSource) -> None:
    plain = pipeline.make_plan(make_source("llama"), "xquant")
    latent = pipeline.make_plan(make_source("llama", **WIDE), "xquant")
    assert all(not x.inputs.bases and x.planes == ("value",) for x in plain.kv)
    assert all(x.planes == ("key", "value") for x in latent.kv)
    assert [x.inputs.bases["key"].shape for x in latent.kv] == [(64, 16)] * 2


def test_bits_are_counted_against_keys_and_values(make_source: MakeSource) -> None:
    """Multi-head: X is half as wide as keys and values, 4.5 bits (groups of 64) become 2.25."""
    source = make_source("llama", num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    assert bits(pipeline.make_plan(source, "xquant")) == (4 + 32 / 64) / 2
    assert bits(pipeline.make_plan(source, "xquant@2bit")) == (2 + 32 / 64) / 2
    grouped = pipeline.make_plan(make_source("llama", **WIDE), "xquant")
    assert bits(grouped) == pytest.approx(((4 + 32 / 128) + (4 + 32 / 16)) / 2)


@pytest.mark.parametrize(
    ("recipe", "options", "extra"),
    [
        ("xquant@svd", {}, ()),
        ("xquant", WIDE, ()),
        ("xquant-cl@svd", {}, (BASE, "kv_cache.inputs.difference.base_layers=1")),
        ("xquant-cl", {"layers": 4, **WIDE}, (BASE,)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_an_artifact_without_rounding_is_its_model(
    recipe: str,
    options: dict[str, int],
    extra: tuple[str, ...],
    packed: bool,
    make_source: MakeSource,
    tmp_path: Path,
) -> None:
    """Bases are those of the weights that the artifact holds, packed ones as they are decoded."""
    weights = ("weights=[{match: '@attention', codec: {kind: affine, bits: 4}, solver: {kind: rtn}}]",)
    overrides = (*IDENTITY, *extra, *(weights if packed else ()))
    plan = pipeline.make_plan(make_source("llama", **options), recipe, overrides)
    model = kvpack.load(pipeline.export(plan, tmp_path / "out").path)
    ids = torch.randint(3, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids, past_key_values=DynamicCache()).logits
        cache = new_cache(model)
        pieces = [model(part, past_key_values=cache).logits for part in ids.split([25, 1, 14], 1)]
    assert cache.stored_tokens > 0
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        ("xquant", "gemma2"),
        ("xquant@svd", "gemma3_text"),
        ("xquant@svd", "mistral"),
        ("xquant", "qwen2"),
        ("xquant@svd", "phi3"),
        ("xquant-cl", "gpt_neox"),
        ("xquant-cl@residual", "phi3"),
    ],
)
def test_other_families_from_plan_to_generation(
    recipe: str, family: str, make: Make, prompt: torch.Tensor
) -> None:
    check_everything(make(recipe, family, layers=4), prompt)


REFUSED = [
    ("xquant@plain", WIDE, (), "the input of layer 0 has 64 channels, its keys and values 32 together"),
    ("xquant", {}, ("kv_cache.key.transforms=[{kind: hadamard}]",), "transform 'hadamard' cannot be used"),
    (
        "xquant",
        {},
        ("kv_cache.tiers.old.value={kind: codebook}",),
        "codec 'codebook' cannot be used with kv_cache.inputs",
    ),
    (
        "xquant",
        WIDE,
        ("kv_cache.inputs.tap=residual",),
        "layer 0 cannot be stored in singular bases before its norm",
    ),
    (
        "xquant-cl",
        {},
        ("kv_cache.inputs.difference.base.group.axis=token",),
        "difference.base encodes 128 tokens at a time, the tier 1",
    ),
]


@pytest.mark.parametrize(("recipe", "options", "overrides", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(
    recipe: str, options: dict[str, int], overrides: tuple[str, ...], message: str, make_source: MakeSource
) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        pipeline.make_plan(make_source("llama", **options), recipe, overrides)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_differences_are_refused_with_sliding_windows(family: str, make_source: MakeSource) -> None:
    pipeline.make_plan(make_source(family), "xquant")
    with pytest.raises(RecipeError, match="cannot be used with sliding windows"):
        pipeline.make_plan(make_source(family), "xquant-cl")


def test_rope_that_changes_with_the_length_is_refused(make_source: MakeSource) -> None:
    model = pipeline.make_plan(make_source("llama"), "xquant").model
    loaded = kvpack.recipe.load.load("xquant")
    with pytest.raises(RecipeError, match="inputs cannot be cached for llama"):
        kvpack.recipe.resolve.resolve(loaded, replace(model, rope_type="dynamic"))


def test_a_manifest_with_other_bases_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    plan = pipeline.make_plan(make_source("llama"), "xquant@svd")
    path = pipeline.export(plan, tmp_path / "out").path
    manifest = Manifest.from_json((path / "kvpack.json").read_bytes())
    check_parts(manifest, path)
    layer: KVLayerPlan = manifest.kv[0]
    assert layer.inputs is not None
    narrow = replace(layer.inputs, channels=63)
    with pytest.raises(ArtifactError, match="bases: not those of keys and values"):
        check_parts(replace(manifest, kv=(replace(layer, inputs=narrow), *manifest.kv[1:])), path)
