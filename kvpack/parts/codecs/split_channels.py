"""Two codecs for two kinds of channels: wide ranges and narrow ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.grouping import joint_segment
from kvpack.core.lazy import torch
from kvpack.core.nested import inside, prefixed
from kvpack.core.roles import Codec
from kvpack.core.types import Payload, Shape, Stat, State, Stats, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SplitChannels(Codec):
    """Encodes the `share` of channels with the widest range with `wide`, the others with `narrow`.

    A channel's range is max - min over the calibration tokens. By default the heads of a layer share
    one choice, made by the range over all of them; with `per_head` each has its own. At least one
    channel goes to either side, and both sides keep the order of the channels.

    State: "order" int32 [D], or [K, D] `per_head`: the wide channels, then the narrow ones. Payload:
    those of the two codecs, named "wide.…" and "narrow.…". Source: VidKV, arXiv 2503.16257, section
    3 and table 1 (the range selects better than variance or outlier counts).

    Raises:
        RecipeError: a codec that wants statistics, which nobody measures on a selection of channels;
            a `share` that leaves one side empty; or a segment that does not hold one whole block.
    """

    wide: Codec
    narrow: Codec
    share: float = field(default=0.5, metadata={"minimum": 0.0, "maximum": 1.0})
    per_head: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise RecipeError(
                f"a share of {self.share} leaves one side of the split empty",
                hint="use a share between 0 and 1, or one codec for all channels",
            )
        for codec in (self.wide, self.narrow):
            if codec.requires():
                raise RecipeError(
                    f"codec {type(codec).__name__} cannot encode a selection of channels",
                    why="it learns from calibration, which measures all channels together",
                    hint="use a codec that learns nothing",
                )
        joint_segment(self.token_block, self.wide.segment, self.narrow.segment)

    @property
    def token_block(self) -> int:
        """Least common multiple of both."""
        return math.lcm(self.wide.token_block, self.narrow.token_block)

    @property
    def segment(self) -> int:
        """Whole blocks of the shorter segment, where there are any."""
        return joint_segment(self.token_block, self.wide.segment, self.narrow.segment)

    def requires(self) -> frozenset[Stat]:
        """Range of every channel of the input."""
        return frozenset({Stat("channel_range")})

    def fit(self, stats: Stats) -> State:
        """Sort channels by range, ties in their original order.

        Raises:
            KvpackError: the ranges are missing or not finite.
        """
        found = stats.get("channel_range")
        if found is None or not all(bool(found[n].isfinite().all()) for n in ("low", "high")):
            state = "were not measured" if found is None else "are not finite"
            raise KvpackError(
                f"the ranges of the channels {state}", hint="calibrate again with sound text and weights"
            )
        low, high = found["low"], found["high"]
        ranges = high - low if self.per_head else high.amax(0) - low.amin(0)
        order = torch.argsort(ranges, dim=-1, descending=True, stable=True)
        wide, narrow = order.tensor_split((self._wide(order.shape[-1]),), -1)
        return {"order": torch.cat((wide.sort(-1).values, narrow.sort(-1).values), -1).to(torch.int32)}

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """The order of the channels."""
        return {"order": TensorSpec((shape[-3], shape[-1]) if self.per_head else (shape[-1],), "int32")}

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Both payloads.

        Raises:
            RecipeError: there is only one channel.
        """
        *outer, tokens, channels = shape
        if channels < 2:
            raise RecipeError("one channel cannot be split", hint="use one codec for all channels")
        wide = self._wide(channels)
        return {
            **prefixed("wide", self.wide.spec((*outer, tokens, wide), dtype)),
            **prefixed("narrow", self.narrow.spec((*outer, tokens, channels - wide), dtype)),
        }

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Sort the channels of `x` and encode both sides."""
        ordered = x.gather(-1, self._index(x.shape, state["order"]))
        wide, narrow = ordered.tensor_split((self._wide(x.shape[-1]),), -1)
        tensors = {
            **prefixed("wide", self.wide.encode(wide, {}, valid).tensors),
            **prefixed("narrow", self.narrow.encode(narrow, {}, valid).tensors),
        }
        return Payload(tensors, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """Decode both sides and put every channel back into its place."""
        sides = (codec.decode(inner, {}, dtype) for codec, inner in self._sides(payload))
        return self._in_place(torch.cat(list(sides), -1), state)

    @property
    def reads_codes(self) -> bool:
        """Where both do."""
        return self.wide.reads_codes and self.narrow.reads_codes

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """The sum over both sides, each with its channels of the query."""
        query = query.float()
        ordered = query.gather(-1, self._index(query.shape, state["order"]))
        parts = ordered.tensor_split((self._wide(query.shape[-1]),), -1)
        pairs = zip(parts, self._sides(payload), strict=True)
        wide, narrow = (codec.scores(part, inner, {}) for part, (codec, inner) in pairs)
        return wide + narrow

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """The sums of both sides, every channel in its place."""
        sides = (codec.mix(weights, inner, {}) for codec, inner in self._sides(payload))
        return self._in_place(torch.cat(list(sides), -1), state)

    def _sides(self, payload: Payload) -> Iterator[tuple[Codec, Payload]]:
        """Each codec with its payload."""
        *outer, channels = payload.shape
        wide = self._wide(channels)
        for name, codec, count in (("wide", self.wide, wide), ("narrow", self.narrow, channels - wide)):
            yield codec, Payload(inside(name, payload.tensors), (*outer, count))

    def _in_place(self, ordered: Tensor, state: State) -> Tensor:
        """Put channels in stored order back into their places."""
        return torch.empty_like(ordered).scatter_(-1, self._index(ordered.shape, state["order"]), ordered)

    def _wide(self, channels: int) -> int:
        return max(1, int(channels * self.share + 1e-9))

    def _index(self, shape: Shape, order: Tensor) -> Tensor:
        heads = self.per_head and len(shape) > 2
        return (order.long().unsqueeze(-2) if heads else order.long()).expand(shape)
