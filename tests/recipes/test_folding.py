"""With quantisation switched off, RotateKV's changes of basis leave a model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvpack
from kvpack import pipeline
from kvpack.runtime.install import new_cache
from tests.recipes.conftest import SMALL, MakeSource
from tests.tiny_models import FAMILIES

EXACT = """
kvpack: 1
name: rotated-not-quantised
extends: rotatekv
kv_cache:
  tiers:
    old: {codec: {kind: identity}}
  policy: {kind: sink_recent, sink_tokens: 0, recent_tokens: 0}
"""

# Beyond the families of the other tests: those whose attention splits off the rotated channels.
PARTIAL_ROTATION = ("stablelm", "phi")

Logits = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]


def no_cache(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def prefill(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=True).logits


def decoded_prefill(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """One pass that attends to its own keys and values after the round trip through the store."""
    return model(tokens, past_key_values=new_cache(model, exact_prefill=False), use_cache=True).logits


def token_by_token(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    cache = new_cache(model)
    steps = tokens.split((20, *[1] * (tokens.shape[1] - 20)), dim=1)
    logits = [model(step, past_key_values=cache, use_cache=True).logits for step in steps]
    assert cache.stored_tokens > 0
    return torch.cat(logits, dim=1)


@pytest.fixture(scope="module")
def rotated(
    tmp_path_factory: pytest.TempPathFactory, make_source: MakeSource
) -> Callable[[str], tuple[PreTrainedModel, PreTrainedModel]]:
    """The source and its rotated export, both loaded."""
    root = tmp_path_factory.mktemp("folding")
    recipe = root / "exact.yaml"
    recipe.write_text(EXACT)
    made: dict[str, tuple[PreTrainedModel, PreTrainedModel]] = {}

    def get(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
        if family not in made:
            source = make_source(family)
            out = pipeline.export(pipeline.make_plan(source, str(recipe), SMALL), root / family).path
            made[family] = (AutoModelForCausalLM.from_pretrained(source).eval(), kvpack.load(out))
        return made[family]

    return get


@pytest.mark.parametrize("path", [no_cache, prefill, decoded_prefill, token_by_token])
@pytest.mark.parametrize("family", [*FAMILIES, *PARTIAL_ROTATION])
def test_rotation_without_quantisation_changes_nothing(
    family: str,
    path: Logits,
    rotated: Callable[[str], tuple[PreTrainedModel, PreTrainedModel]],
    prompt: torch.Tensor,
) -> None:
    source, model = rotated(family)
    tokens = prompt[:, :60]
    with torch.inference_mode():
        expected, found = source(tokens, use_cache=False).logits, path(model, tokens)
    assert expected.abs().max() > 0.3  # 1e-4 is small beside the logits
    assert (found - expected).abs().max() <= 1e-4


def test_the_rotation_is_really_there(
    rotated: Callable[[str], tuple[PreTrainedModel, PreTrainedModel]], tmp_path: Path
) -> None:
    source, model = rotated("llama")
    for layer, other in zip(source.model.layers, model.model.layers, strict=True):
        for name in ("v_proj", "o_proj"):
            before = layer.self_attn.get_submodule(name).weight
            after = other.self_attn.get_submodule(name).weight
            assert (before - after).norm() > 0.5 * before.norm()


@pytest.mark.parametrize("family", [*FAMILIES, *PARTIAL_ROTATION])
def test_keys_are_stored_without_their_positions(
    family: str, rotated: Callable[[str], tuple[PreTrainedModel, PreTrainedModel]]
) -> None:
    """In the first layer, one token repeated has one key before RoPE, wherever it stands."""
    model = rotated(family)[1]
    tokens = torch.full((1, 20), 77)
    cache = new_cache(model, exact_prefill=False)
    with torch.inference_mode():
        model(tokens, past_key_values=cache, use_cache=True)
    (piece,) = cache.layers[0]._planes["key"].tiers[0].store.pieces(0, 1_000)
    stored = piece.tensors["values"]
    assert stored.shape[-2] == 20
    assert (stored - stored[..., :1, :]).abs().max() < 1e-4 * stored.abs().max()
