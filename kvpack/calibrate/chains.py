"""The chains of one layer's cache, with what is known about the layer without any data."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from kvpack.calibrate.collect import Chain
from kvpack.core.types import Rope, Site, State, Stream
from kvpack.models.rope import rope_of
from kvpack.models.view import ModelView, Reader
from kvpack.recipe.kv_plan import KVLayerPlan

if TYPE_CHECKING:
    from torch import Tensor


def make_chains(kv: KVLayerPlan, view: ModelView, source: Reader, tokens: int) -> dict[str, Chain]:
    """The chains of keys and values, and of an index over keys where tokens are retrieved.

    Args:
        kv: the layer's cache.
        view: the model.
        source: gives the rows of projections, by checkpoint name.
        tokens: of every sample.
    """
    layer = kv.attention.layer
    rope: Rope | None = None
    if any(t.needs_rope for chain in kv.chains.values() for t in chain.transforms):
        rope = rope_of(view.model, view.attention(layer))
    at = Site(layer, rope, torch.arange(tokens)[None], kv.attention.kv_heads)

    def given(chain: str, stream: Stream) -> State:
        return _projection(kv, chain, view, source) if stream == "projection" else _partners(kv, chain, view)

    return {name: Chain(plane, at, partial(given, name)) for name, plane in kv.chains.items()}


def _partners(kv: KVLayerPlan, chain: str, view: ModelView) -> State:
    """The channels that RoPE turns together; values and models without RoPE have none."""
    channels = kv.attention.head_dim
    if chain == "value" or view.spec.rope_type == "none":
        return {"partner": torch.arange(channels)}
    rope = rope_of(view.model, view.attention(kv.attention.layer), fixed=False)
    return {"partner": rope.partners(channels)}


def _projection(kv: KVLayerPlan, chain: str, view: ModelView, source: Reader) -> State:
    """The rows of the projection that a chain's input comes from, with its bias where it has one."""
    projection = kv.attention.value if chain == "value" else kv.attention.key
    rows = torch.cat([torch.arange(start, stop) for start, stop in projection.heads])
    found: dict[str, Tensor] = {"heads": torch.tensor(len(projection.heads))}
    for name in ("weight", "bias"):
        full = f"{projection.linear}.{name}"
        if full in view.spec.tensors:
            found[name] = source.read(full)[rows].float()
    return found
