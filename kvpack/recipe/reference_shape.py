"""The model shape at which recipes are listed: bits depend on a model, so a list must name one.

The linear layers of the decoder blocks of Llama 3 8B, without embeddings, norms and weights: 32
layers, 8 KV heads of 128 channels, 32 query heads, hidden size 4096, MLP 14336, bfloat16, RoPE.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from kvpack.core.model_spec import (
    AttentionSpec,
    InputSite,
    LinearSpec,
    ModelSpec,
    NormSpec,
    Projection,
    SiteRole,
    SourceTensor,
)

PROMPT_TOKENS = 4096
"""Length of the prompt after which the cache is counted."""
REFERENCE_SHAPE = (
    f"32 layers, 8 KV heads of 128 channels, hidden size 4096 (Llama 3 8B), {PROMPT_TOKENS} tokens"
)
"""The shape in words."""

_LAYERS, _HIDDEN, _MLP, _HEADS, _KV_HEADS, _HEAD_DIM = 32, 4096, 14336, 32, 8, 128
_DTYPE, _FILE = "bfloat16", "reference.safetensors"
_SHAPES = {
    "q": (_HEADS * _HEAD_DIM, _HIDDEN),
    "k": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
    "v": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
    "o": (_HIDDEN, _HEADS * _HEAD_DIM),
    "gate": (_MLP, _HIDDEN),
    "up": (_MLP, _HIDDEN),
    "down": (_HIDDEN, _MLP),
}


@functools.cache
def reference_model() -> ModelSpec:
    """The reference shape as a model that has no file: recipes can be resolved against it."""
    linears = tuple(_linear(layer, role) for layer in range(_LAYERS) for role in _SHAPES)
    return ModelSpec(
        path=Path(),
        family="reference",
        architecture="reference shape",
        hidden_size=_HIDDEN,
        vocab_size=0,
        max_positions=2 * PROMPT_TOKENS,
        dtype=_DTYPE,
        rope_type="default",
        tensors={x.weight: SourceTensor(x.shape, _DTYPE, _FILE) for x in linears},
        linears=linears,
        attention=tuple(_attention(layer) for layer in range(_LAYERS)),
        blocks=tuple(_block(layer) for layer in range(_LAYERS)),
        sites=tuple(site for layer in range(_LAYERS) for site in _sites(layer)),
        final_norm=NormSpec("model.norm.weight"),
    )


def _block(layer: int) -> str:
    return f"model.layers.{layer}"


def _name(layer: int, role: str) -> str:
    owner = "mlp" if role in ("gate", "up", "down") else "self_attn"
    return f"{_block(layer)}.{owner}.{role}_proj"


def _linear(layer: int, role: str) -> LinearSpec:
    return LinearSpec(_name(layer, role), role, _SHAPES[role], layer, bias=False)


def _sites(layer: int) -> Iterator[InputSite]:
    """What the layers of a block read, as in a Llama."""
    block = _block(layer)
    groups: tuple[tuple[SiteRole, tuple[str, ...], str], ...] = (
        ("attention_input", ("q", "k", "v"), "input_layernorm"),
        ("attention_output", ("o",), ""),
        ("mlp_input", ("gate", "up"), "post_attention_layernorm"),
        ("mlp_middle", ("down",), ""),
    )
    gate, up = (Projection(_name(layer, role), ((0, _MLP),)) for role in ("gate", "up"))
    for role, readers, norm in groups:
        weights = tuple(f"{_name(layer, reader)}.weight" for reader in readers)
        before = NormSpec(f"{block}.{norm}.weight") if norm else None
        makers, scaled = ((gate, up), up) if role == "mlp_middle" else ((), None)
        channels = _SHAPES[readers[0]][1]
        yield InputSite(role, f"{block}.{role}", layer, channels, weights, before, makers, scaled)


def _attention(layer: int) -> AttentionSpec:
    def projection(role: str, heads: int) -> Projection:
        rows = tuple((i * _HEAD_DIM, (i + 1) * _HEAD_DIM) for i in range(heads))
        return Projection(_name(layer, role), rows)

    return AttentionSpec(
        layer=layer,
        module=f"{_block(layer)}.self_attn",
        block=_block(layer),
        kind="full",
        window=None,
        heads=_HEADS,
        kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        query=projection("q", _HEADS),
        key=projection("k", _KV_HEADS),
        value=projection("v", _KV_HEADS),
        output=projection("o", _HEADS),
        key_norm=False,
    )
