from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from kvpack.core.errors import UnsupportedModel
from kvpack.models import open_model
from kvpack.models.rope import rope_of
from kvpack.models.view import ModelView
from kvpack.models.weights import SourceReader
from tests.tiny_models import make_model


def _captured(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Keys after RoPE, as the model itself caches them."""
    from kvpack.calibrate.hooks import Tap

    keys: list[torch.Tensor] = []
    with torch.no_grad():
        model(tokens, past_key_values=Tap(lambda k, v: keys.append(k)), use_cache=True)
    return keys


def _positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1])[None]


def test_undo_inverts_apply(folder, tokens):
    spec = open_model(folder)
    view = ModelView.build(spec)
    x = torch.randn(2, 2, tokens.shape[1], 16, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        rope = rope_of(view.model, view.attention(layer))
        turned = rope.apply(x, _positions(tokens) + 5)
        assert not torch.allclose(turned, x, atol=1e-2)
        torch.testing.assert_close(rope.undo(turned, _positions(tokens) + 5), x, atol=2e-6, rtol=0)


def test_matches_the_keys_of_the_model(folder, tokens, reference):
    """Un-roped keys are the projection's output, and roping them gives the cached keys back."""
    spec = open_model(folder)
    outputs: dict[int, torch.Tensor] = {}
    for layer, a in enumerate(spec.attention):
        source = f"{a.module}.k_norm" if a.key_norm else a.key.linear
        reference.get_submodule(source).register_forward_hook(
            lambda m, i, out, layer=layer: outputs.__setitem__(layer, out)
        )
    for layer, (a, key) in enumerate(zip(spec.attention, _captured(reference, tokens), strict=True)):
        rope = rope_of(reference, reference.get_submodule(a.module))
        if a.key_norm:
            normed = outputs[layer]
            before = normed if normed.shape[1] == a.kv_heads else normed.transpose(1, 2)
        else:
            before = torch.stack([outputs[layer][..., i:j] for i, j in a.key.heads], dim=1)
        torch.testing.assert_close(rope.undo(key, _positions(tokens)), before, atol=1e-5, rtol=0)
        torch.testing.assert_close(rope.apply(before, _positions(tokens)), key, atol=1e-5, rtol=0)


def test_scaled_cos_and_sin_are_undone(tmp_path):
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 128,
    }
    spec = open_model(make_model(tmp_path, "llama", rope_parameters=rope))
    view = ModelView.build(spec)
    turn = rope_of(view.model, view.attention(0))
    x = torch.randn(1, 2, 30, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(30)[None]
    scale = turn.apply(x, positions).norm() / x.norm()
    assert scale > 1.05
    torch.testing.assert_close(turn.undo(turn.apply(x, positions), positions), x, atol=2e-6, rtol=0)


def test_rounded_cos_and_sin_are_undone(tmp_path):
    """In bf16 the model rounds cos and sin; undoing has to use the rounded ones."""
    spec = open_model(make_model(tmp_path, "llama", dtype="bfloat16"))
    view = ModelView.build(spec)
    rope = rope_of(view.model, view.attention(0))
    x = torch.randn(1, 2, 200, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(200)[None]
    cos, _ = rope.embed(positions)
    assert cos.dtype == torch.bfloat16
    torch.testing.assert_close(rope.undo(rope.apply(x, positions), positions), x, atol=2e-6, rtol=0)


def test_length_dependent_rope_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    spec = open_model(make_model(tmp_path, "llama", rope_parameters=rope))
    assert spec.rope_type == "dynamic"
    view = ModelView.build(spec)
    view.load_block(0, SourceReader.of(spec))
    with pytest.raises(UnsupportedModel, match="'dynamic' cannot be undone"):
        rope_of(view.model, view.attention(0))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
        ("cohere2", {"sliding_window": 24, "layer_types": "alternate"}),
        ("exaone4", {"sliding_window": 24, "layer_types": "alternate"}),
    ],
)
def test_layers_without_rope_are_left_alone(tmp_path, tokens, family, settings):
    """Their keys do not depend on the position; those of the other layers do."""
    spec = open_model(make_model(tmp_path, family, layers=4, **settings))
    view = ModelView.build(spec)
    moved = [
        not torch.equal(rope.apply(x, _positions(tokens) + 9), x)
        for x in [torch.ones(1, 2, tokens.shape[1], 16)]
        for rope in [rope_of(view.model, view.attention(layer)) for layer in range(4)]
    ]
    view.load_outer(SourceReader.of(spec))
    for layer in range(4):
        view.load_block(layer, SourceReader.of(spec))
    same = tokens[:1, :1].expand(1, 12)
    keys = _captured(view.model, same)
    # One token repeated: without RoPE the keys of the first layer are the same at every position.
    assert moved[0] == (not torch.allclose(keys[0][:, :, :1].expand_as(keys[0]), keys[0], atol=1e-6))
    assert sorted(set(moved)) == [False, True]


def _interleaved(rotated: int) -> list[int]:
    return [d ^ 1 if d < rotated else d for d in range(16)]


def _halves(rotated: int) -> list[int]:
    return [(d + rotated // 2) % rotated if d < rotated else d for d in range(16)]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        *((f, _halves(16)) for f in ("llama", "qwen3", "gemma2", "gemma3_text", "phi3")),
        ("gpt_neox", _halves(4)),
        ("stablelm", _halves(4)),
        ("glm", _interleaved(8)),
        ("cohere", _interleaved(16)),
    ],
)
def test_partners_are_the_channels_that_turn_together(checkpoint, family, expected):
    spec = open_model(checkpoint(family))
    view = ModelView.build(spec)
    for layer in range(2):
        rope = rope_of(view.model, view.attention(layer))
        assert rope.partners(16).tolist() == expected
        for d, partner in enumerate(expected):
            turned = rope.apply(torch.eye(16)[d].reshape(1, 1, 1, 16), torch.tensor([[9]]))
            assert set(turned.flatten().nonzero().flatten().tolist()) <= {d, partner}


def test_partners_need_no_fixed_frequencies(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    view = ModelView.build(open_model(make_model(tmp_path, "llama", rope_parameters=rope)))
    with pytest.raises(UnsupportedModel, match="cannot be undone"):
        rope_of(view.model, view.attention(0))
    assert rope_of(view.model, view.attention(0), fixed=False).partners(16).tolist() == _halves(16)
