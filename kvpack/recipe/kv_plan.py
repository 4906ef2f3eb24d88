"""The plan of the cache: how each attention layer stores what it remembers, to the byte."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvpack.core.model_spec import AttentionSpec
from kvpack.core.roles import Plane, Retriever, TierPolicy
from kvpack.core.types import Shape, TensorSpec
from kvpack.recipe.inputs_plan import InputsPlan, basis_name
from kvpack.recipe.plane_plan import PlanePlan

PLANES: tuple[Plane, ...] = ("key", "value")
"""The two sides of a cache, in the order in which they are handled everywhere."""

CHAINS: tuple[str, ...] = (*PLANES, "index")
"""Everything that may transform and encode in a layer; an index is there where tokens are retrieved."""


Way = Literal["codes", "rows", "blocks", "dense"]
"""See `Reading`."""


@dataclass(frozen=True)
class Reading:
    """How attention of a decode step gets at what a layer has stored.

    `key` and `value` are "codes" (computed on as they are, in their own basis), "rows" (a few tokens at a
    time are decoded and transformed back by a compiled loop), "blocks" (the same in tensors, more
    tokens at a time) or "dense" (decoded as a whole, for the model's own attention); `why` tells what
    stands against codes.
    """

    key: Way
    value: Way
    why: str = ""

    @property
    def on_codes(self) -> bool:
        """Whether past keys and values are never decoded as a whole."""
        return self.key != "dense"


@dataclass(frozen=True)
class RetrievalPlan:
    """How a layer's queries choose the tokens that they read.

    `index` is a chain over keys; its one codec codes every token as it comes. `residency` tells
    where keys and values are kept: with the model, or on the CPU, from where those that are chosen
    are fetched.
    """

    retriever: Retriever
    index: PlanePlan
    residency: Literal["model", "cpu"] = "model"


@dataclass(frozen=True)
class KVLayerPlan:
    """The cache of one attention layer; `inputs` where it does not store keys and values."""

    attention: AttentionSpec
    key: PlanePlan
    value: PlanePlan
    policy: TierPolicy
    inputs: InputsPlan | None = None
    retrieval: RetrievalPlan | None = None

    @property
    def chains(self) -> Mapping[str, PlanePlan]:
        """Everything that transforms and encodes: "key", "value", and "index" where there is one."""
        index = {} if self.retrieval is None else {"index": self.retrieval.index}
        return {"key": self.key, "value": self.value, **index}

    @functools.cached_property
    def reading(self) -> Reading:
        """Which way attention takes."""
        reasons = {
            "the layer stores its inputs, not keys and values": self.inputs is not None,
            "queries choose the tokens that they read": self.retrieval is not None,
            "tokens are ranked by importance": self.policy.scorer is not None,
            "a transform is fitted to the prompt": self.sees_attention and not self.narrowed,
            "the policy drops tokens that the model would read": self.narrowed,
        }
        for why, holds in reasons.items():
            if holds:
                return Reading("dense", "dense", why)
        shape = (1, self.attention.kv_heads, 1, self.attention.head_dim)
        found = {name: self.plane(name).obstacle(name, shape) for name in PLANES}
        ways: dict[Plane, Way] = {
            name: ("rows" if self.plane(name).in_rows else "blocks") if found[name] else "codes"
            for name in PLANES
        }
        why = "; ".join(f"{name}s: {what}" for name, what in found.items() if what)
        return Reading(ways["key"], ways["value"], why)

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Names of the planes that are stored."""
        return PLANES if self.inputs is None else self.inputs.planes

    @property
    def folded_planes(self) -> tuple[Plane, ...]:
        """Planes whose transforms are part of the weights."""
        return tuple(plane for plane in PLANES if self.plane(plane).folded)

    def plane_shape(self, plane: Plane, tokens: int) -> Shape:
        """Shape [1, K, T, D] of what a plane stores of `tokens` tokens; inputs have one wide head."""
        if self.inputs is not None:
            return (1, 1, tokens, self.inputs.width(plane))
        return (1, self.attention.kv_heads, tokens, self.attention.head_dim)

    def state_tensors(self) -> dict[str, TensorSpec]:
        """What artifacts hold beside weights, by its name: states of parts, and bases."""
        layer = self.attention.layer
        tensors = {
            state_name(layer, chain, i, name): spec
            for chain, plane in self.chains.items()
            for i, state in plane.stored_states().items()
            for name, spec in state.items()
        }
        bases = {} if self.inputs is None else self.inputs.bases
        return tensors | {basis_name(layer, plane): spec for plane, spec in bases.items()}

    @property
    def sees_attention(self) -> bool:
        """Whether the cache must be shown the queries of every forward pass."""
        scorer = self.policy.scorer
        fits = any(t.fits_prompt for plane in (self.key, self.value) for t in plane.online)
        ranks = scorer is not None and scorer.needs == "queries"
        return fits or ranks or self.retrieval is not None or self.narrowed

    @property
    def window(self) -> int | None:
        """The newest tokens that a query reads, of the model or of the policy; None for all."""
        known = (w for w in (self.attention.window, self.policy.window) if w is not None)
        return min(known, default=None)

    @property
    def narrowed(self) -> bool:
        """Whether the policy drops tokens that the model would read."""
        return self.window != self.attention.window

    def ranked(self, plane: Plane) -> bool:
        """Whether importance decides by which codec a token of this plane is encoded."""
        return self.policy.scorer is not None and len(set(self.plane(plane).codecs)) > 1

    def block(self, plane: Plane) -> int:
        """Tokens that leave the exact tail together; where they are ranked, those of both planes."""
        if self.policy.scorer is None:
            return self.plane(plane).block
        return math.lcm(self.key.block, self.value.block)

    def plane(self, plane: Plane) -> PlanePlan:
        """The key or the value side."""
        return self.key if plane == "key" else self.value

    def held_tokens(self, tokens: int, plane: Plane) -> tuple[tuple[int, ...], int]:
        """Tokens per coded tier, and exact tokens, after a prompt of `tokens` given in one piece.

        A sliding layer gives up whole token blocks that no later token can see.
        """
        block = self.block(plane)
        left = self.policy.leaving(tokens, block, plane)
        needed = 0 if self.window is None else max(0, tokens - self.window + 1)
        first = needed // block * block
        exact = tokens - max(left, first)
        if self.policy.scorer is not None:
            here = max(0, left - first)
            return self.policy.placement(here, block, plane) if self.ranked(plane) else (here, 0), exact
        coded = self.policy.placement(left, block, plane)
        return drop_oldest(coded, min(first, left)), exact

    def ranking_nbytes(self, tokens: int) -> int:
        """Bytes of tier masks and of what scores are made from, after such a prompt."""
        scorer = self.policy.scorer
        ranked: list[Plane] = [plane for plane in PLANES if self.ranked(plane)]
        if scorer is None or not ranked:
            return 0
        (high, low), exact = self.held_tokens(tokens, ranked[0])
        kv_heads, channels = self.attention.kv_heads, self.attention.head_dim
        heads = self.plane(ranked[0]).coded_shape((1, kv_heads, 1, channels))[1]
        scored = exact + (high + low if self.policy.demote else 0)
        sums = sum(spec.nbytes for spec in scorer.observed_spec(kv_heads, scored).values())
        return heads * (-(-(high + low) // 8)) + sums

    def visible_tokens(self, tokens: int) -> int:
        """Tokens that the next token attends to where nothing is compressed."""
        window = self.attention.window
        return tokens if window is None else min(tokens, window - 1)


def drop_oldest(tiers: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Take `tokens` away from tiers in order of age; the last tier holds the oldest."""
    kept = []
    for count in reversed(tiers):
        gone = min(count, tokens)
        kept.append(count - gone)
        tokens -= gone
    return tuple(reversed(kept))


def state_name(layer: int, plane: str, index: int, name: str) -> str:
    """Name of a KV part's state in calibrations and artifacts; `index` is its place in the chain."""
    return f"layers.{layer}.{plane}.{index}.{name}"
