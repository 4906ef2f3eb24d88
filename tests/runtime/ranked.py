"""Schemes with ranked tiers, and feeding a layer with its attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpack.core.roles import Codec, TierPolicy, Transform
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.channel_separable import ChannelSeparable
from kvpack.parts.policies.top_fraction import TopFraction
from kvpack.parts.scorers.accumulated_attention import AccumulatedAttention
from kvpack.parts.scorers.normalized_attention import NormalizedAttention
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.runtime.cache import KVPackCache
from kvpack.runtime.install import install, new_cache
from tests.runtime.rows import change_rows
from tests.runtime.schemes import attention_of, logits, text


def whole(bits: int) -> Affine:
    """A grid per channel over all tokens of a segment."""
    return Affine(bits=bits, group=Group("token", 0), scale_dtype="float32")


def separable(bits: int) -> ChannelSeparable:
    return ChannelSeparable(Affine(bits=bits, group=Group("channel", 0), scale_dtype="float32"))


def tokenwise(bits: int, size: int = 4) -> Affine:
    return Affine(bits=bits, group=Group("channel", size), scale_dtype="float32")


@dataclass(frozen=True)
class Ranked:
    """Codecs of the high and the low tier, and the policy."""

    key: tuple[Codec, Codec]
    value: tuple[Codec, Codec]
    policy: TierPolicy
    key_transforms: tuple[Transform, ...] = ()

    def plans(self, model: Any) -> list[KVLayerPlan]:
        none = ({},) * (len(self.key_transforms) + 2)
        return [
            KVLayerPlan(
                spec,
                PlanePlan(self.key_transforms, False, self.key, none),
                PlanePlan((), False, self.value, ({}, {})),
                self.policy,
            )
            for spec in attention_of(model)
        ]

    def install(self, model: Any) -> Any:
        install(model, self.plans(model), {})
        return model


def zipcache(share: float = 0.6, interval: int = 32, **scorer: Any) -> Ranked:
    policy = TopFraction(NormalizedAttention(**scorer), share=share, interval=interval)
    return Ranked((whole(4), whole(2)), (separable(4), separable(2)), policy)


def mikv(
    share: float = 0.2, *, high: Codec | None = None, low: int = 2, least: int = 2, **policy: Any
) -> Ranked:
    policy = {"interval": 1, "recent_share": 0.5, "least_tokens": least, "demote": True, **policy}
    codecs = (tokenwise(8) if high is None else high, tokenwise(low))
    return Ranked(codecs, codecs, TopFraction(AccumulatedAttention(), share=share, **policy))


@dataclass(frozen=True)
class Fed:
    """What a layer was given, and what attention was to read."""

    query: Tensor
    key: Tensor
    value: Tensor
    seen_key: Tensor
    seen_value: Tensor


def feed(
    cache: KVPackCache,
    tokens: int,
    *,
    batch: int = 1,
    seed: int = 0,
    mask: Tensor | None = None,
    heads: int = 4,
    sharp: float = 2.0,
) -> Fed:
    """Give layer 0 random queries, keys and values in one pass, as attention would."""
    generator = torch.Generator().manual_seed(seed)
    layer, attention = cache.layers[0], cache.layers[0].plan.attention
    shape = (batch, attention.kv_heads, tokens, attention.head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    query = sharp * torch.randn((batch, heads, tokens, attention.head_dim), generator=generator)
    cache.begin(batch, tokens, mask)
    k, v = layer.update(keys, values)
    seen = None
    if mask is not None:
        rows = torch.arange(k.shape[2] - tokens, k.shape[2])
        seen = (torch.arange(k.shape[2]) <= rows[:, None]) & mask[:, None, None, -k.shape[2] :].bool()
    instead = layer.attend(query, k, v, seen, attention.head_dim**-0.5)
    k, v, _ = (k, v, seen) if instead is None else instead
    return Fed(query, keys, values, k, v)


def attention(query: Tensor, keys: Tensor, past: int) -> Tensor:
    """Causal probabilities float64 [H, T, S] of one row, key heads repeated."""
    heads, tokens, channels = query.shape
    keys = keys.repeat_interleave(heads // len(keys), 0)
    scores = query.double() @ keys.double().transpose(1, 2) / channels**0.5
    allowed = torch.arange(keys.shape[1]) <= past + torch.arange(tokens)[:, None]
    return scores.masked_fill(~allowed, -math.inf).softmax(-1)


def check_moved_rows(model: Any, change: str) -> None:
    """Rows that moved go on, and are ranked, as if they had always been where they are now.

    Logits alone would not show masks in the wrong rows: keys and values move together.
    """
    ids, before, after = text(80, batch=3), [40, *[1] * 22], [1] * 18
    moved, still = new_cache(model), new_cache(model)
    logits(model, ids[:, :62], moved, before)
    index = change_rows(moved, change)
    logits(model, ids[index, :62], still, before)
    ours, expected = (logits(model, ids[index, 62:], cache, after) for cache in (moved, still))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    for layers in zip(moved.layers, still.layers, strict=True):
        masks = [torch.cat([chunk.mask() for chunk in layer._ranking.chunks], 2) for layer in layers]
        assert torch.equal(*masks)
