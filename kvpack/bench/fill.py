"""Filling a cache with a context, by the model or, where that would take minutes, with random numbers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from kvpack.core.errors import UsageError
from kvpack.loading.plain_cache import plain_cache
from kvpack.runtime.cache import KVPackCache

CHUNK = 16_384
"""Tokens per update of a random fill."""
MODEL_CHUNK = 2048
"""Tokens per forward pass of a fill by the model."""


def takes_random(cache: Any) -> bool:
    """Whether a cache can be filled from outside: all but those that look at queries or store inputs."""
    if not isinstance(cache, KVPackCache):
        return True
    scheme = cache.scheme
    return not scheme.sees_attention and all(plan.inputs is None for plan in scheme.plans)


def fill_by_model(model: Any, cache: Any, ids: Tensor) -> None:
    """Run the model over a prompt [1, T], in pieces."""
    for piece in torch.split(ids, MODEL_CHUNK, dim=1):
        model(input_ids=piece, past_key_values=cache, use_cache=True, **last_only(model))


def last_only(model: Any) -> dict[str, int]:
    """Keyword that makes a model give the logits of the last token alone, as `generate()` does."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known else {}


def fill_randomly(model: Any, cache: Any, tokens: int, generator: torch.Generator) -> None:
    """Give a cache `tokens` tokens of normal keys and values.

    Raises:
        UsageError: the cache wants to see more than keys and values.
    """
    if not takes_random(cache):
        raise UsageError(
            "this cache cannot be filled with random keys and values",
            why="it looks at queries, or stores what keys and values are made from",
            hint="fill it with --fill model",
        )
    shapes = _layer_shapes(model)
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        _announce(cache, start, count, model.device)
        for layer, like in enumerate(shapes):
            if _wants_hidden(cache, layer):
                shape = (1, count, like.hidden)
                cache.track.hidden[layer] = _normal(model, shape, like.dtype, generator)
            keys, values = (
                _normal(model, (1, like.heads, count, dim), like.dtype, generator) for dim in like.dims
            )
            cache.update(keys, values, layer)


class _Like:
    """What one layer caches: heads, sizes of keys and values, dtype."""

    def __init__(self, layer: Any, hidden: int) -> None:
        self.heads, self.dtype, self.hidden = layer.keys.shape[1], layer.keys.dtype, hidden
        self.dims = (layer.keys.shape[3], layer.values.shape[3])


def _layer_shapes(model: Any) -> list[_Like]:
    """Per layer what the model gives to its cache, as one token shows."""
    cache = plain_cache(model)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    hidden = model.config.get_text_config(decoder=True).hidden_size
    if any(getattr(layer, "keys", None) is None or layer.keys.dim() != 4 for layer in cache.layers):
        raise UsageError("a layer of this model caches no keys and values", hint="use --fill model")
    return [_Like(layer, hidden) for layer in cache.layers]


def _normal(model: Any, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=dtype).normal_(generator=generator).to(model.device)


def _announce(cache: Any, start: int, count: int, device: torch.device) -> None:
    """Tell a compressed cache of tokens to come, as the hooks of its model do."""
    if isinstance(cache, KVPackCache):
        cache.begin(1, count)
        cache.track.locate(torch.arange(start, start + count, device=device)[None])


def _wants_hidden(cache: Any, layer: int) -> bool:
    return isinstance(cache, KVPackCache) and cache.scheme.plans[layer].policy.needs_hidden
