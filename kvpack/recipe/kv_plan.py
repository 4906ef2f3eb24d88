"""The plan of the cache: how each attention layer stores what it remembers, to the byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvpack.core.model_spec import AttentionSpec
from kvpack.core.roles import Codec, Part, Plane, Retriever, RowTransform, TierPolicy, Transform
from kvpack.core.types import Shape, TensorSpec
from kvpack.recipe.inputs_plan import InputsPlan, basis_name

PLANES: tuple[Plane, ...] = ("key", "value")
"""The two sides of a cache, in the order in which they are handled everywhere."""

CHAINS: tuple[str, ...] = (*PLANES, "index")
"""Everything that may transform and encode in a layer; an index is there where tokens are retrieved."""


@dataclass(frozen=True)
class PlanePlan:
    """Keys or values of one layer: transforms, whether they are folded, and a codec per coded tier.

    `states` are the tensors that each transform, and then each codec, learns from calibration.
    """

    transforms: tuple[Transform, ...]
    folded: bool
    codecs: tuple[Codec, ...]
    states: tuple[Mapping[str, TensorSpec], ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Transforms and codecs: tokens pass the transforms in order and then one of the codecs."""
        return (*self.transforms, *self.codecs)

    @property
    def block(self) -> int:
        """Tokens that leave the exact tail, and change tiers, together."""
        return math.lcm(*(codec.token_block for codec in self.codecs))

    @property
    def online(self) -> tuple[Transform, ...]:
        """Transforms that run at inference time."""
        return () if self.folded else self.transforms

    def online_states(self) -> dict[int, Mapping[str, TensorSpec]]:
        """States that are needed at inference time, by the part's place in the chain."""
        first = len(self.transforms) if self.folded else 0
        return {i: self.states[i] for i in range(first, len(self.parts))}

    def stored_states(self) -> dict[int, Mapping[str, TensorSpec]]:
        """States that artifacts hold: those needed online, and what folded transforms have learned.

        The latter let an artifact be proven against its source without the calibration.
        """
        learned = (i for i, t in enumerate(self.transforms) if self.folded and t.requires())
        return {i: self.states[i] for i in learned} | self.online_states()

    def obstacle(self, plane: Plane, shape: Shape) -> str:
        """Why a plane of `shape` [B, K, T, D] must be decoded to be read; empty where it need not."""
        for transform in self.online:
            kind = type(transform).__name__
            if tuple(transform.shape(shape)) != tuple(shape):
                return f"{kind} mixes heads"
            if plane == "value" and not transform.linear:
                return f"{kind} depends on the token"
            if plane == "key" and type(transform).dual is Transform.dual:
                return f"{kind} has no partner for queries"
        slow = next((codec for codec in self.codecs if not codec.reads_codes), None)
        return "" if slow is None else f"{type(slow).__name__} codes are decoded"

    @property
    def in_rows(self) -> bool:
        """Whether what is stored can be brought back to the model's basis token by token, see `Reading`."""
        return all(isinstance(t, RowTransform) for t in self.online) and all(c.in_rows for c in self.codecs)

    def coded_shape(self, shape: Shape) -> Shape:
        """Shape [B, K', T, D'] that the codecs see for a plane of `shape` [B, K, T, D]."""
        for transform in self.online:
            shape = transform.shape(shape)
        return shape

    def fitted_nbytes(self, shape: Shape) -> int:
        """Bytes of the states that online transforms make from a cache's first tokens."""
        total = 0
        for transform in self.online:
            total += sum(spec.nbytes for spec in transform.prompt_spec(shape).values())
            shape = transform.shape(shape)
        return total

    def coded_nbytes(self, shape: Shape, tokens: Sequence[int], dtype: str) -> int:
        """Stored bytes of `tokens` tokens per tier, encoded in one piece.

        Args:
            shape: of the plane, [B, K, any, D].
            tokens: per coded tier.
            dtype: of the plane, a torch dtype name.
        """
        total = 0
        for codec, count in zip(self.codecs, tokens, strict=True):
            for length in segments(codec, count):
                # A last token block that the tokens do not fill is filled up.
                whole = -(-length // codec.token_block) * codec.token_block
                coded = self.coded_shape((*shape[:2], whole, shape[3]))
                total += sum(spec.nbytes for spec in codec.spec(coded, dtype).values())
        return total


def segments(codec: Codec, tokens: int) -> Iterator[int]:
    """Lengths of the segments in which a codec encodes `tokens` tokens; one where it needs none."""
    most = codec.segment // codec.token_block * codec.token_block or tokens
    while tokens:
        length = min(most, tokens)
        yield length
        tokens -= length


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

    @property
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
