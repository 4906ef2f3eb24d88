"""A codec, and a second one for what the first leaves over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.grouping import joint_segment
from kvpack.core.lazy import torch
from kvpack.core.nested import inside, prefixed
from kvpack.core.roles import Codec
from kvpack.core.types import Payload, Shape, Stat, State, Stats, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Residual(Codec):
    """``X ~ first(X) + second(X - first(X))``; both keep their own payload.

    The difference is taken in float32 from what `first` decodes to, so `second` also sees its
    rounding. It is zero for tokens that do not count. Tokens are encoded together as the stricter
    of the two asks.

    Payload and state: those of the two codecs, named "first.…" and "second.…". Source of the
    composition: GEAR, arXiv 2403.05527, section 3.

    Raises:
        RecipeError: `second` wants statistics, which nobody measures on a difference; or a segment
            that does not hold one whole block.
    """

    first: Codec
    second: Codec

    def __post_init__(self) -> None:
        if self.second.requires():
            raise RecipeError(
                f"codec {type(self.second).__name__} cannot be the second of a residual",
                why="it learns from calibration, and the difference is not measured there",
                hint="put it first",
            )
        joint_segment(self.token_block, self.first.segment, self.second.segment)

    @property
    def token_block(self) -> int:
        """Least common multiple of both."""
        return math.lcm(self.first.token_block, self.second.token_block)

    @property
    def segment(self) -> int:
        """Whole blocks of the shorter segment, where there are any."""
        return joint_segment(self.token_block, self.first.segment, self.second.segment)

    def requires(self) -> frozenset[Stat]:
        """What `first` asks for."""
        return self.first.requires()

    def fit(self, stats: Stats) -> State:
        """Both states."""
        return {**prefixed("first", self.first.fit(stats)), **prefixed("second", self.second.fit({}))}

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Both states."""
        return {
            **prefixed("first", self.first.state_spec(shape)),
            **prefixed("second", self.second.state_spec(shape)),
        }

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Both payloads; the difference is float32."""
        return {
            **prefixed("first", self.first.spec(shape, dtype)),
            **prefixed("second", self.second.spec(shape, "float32")),
        }

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Encode `x`, decode it, and encode the difference."""
        first = self.first.encode(x, inside("first", state), valid)
        left = x.float() - self.first.decode(first, inside("first", state), torch.float32)
        if valid is not None:
            left = left.masked_fill(~ops.rows.mask(valid, x), 0)
        second = self.second.encode(left, inside("second", state), valid)
        tensors = {**prefixed("first", first.tensors), **prefixed("second", second.tensors)}
        return Payload(tensors, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The sum of both."""
        first, second = (
            codec.decode(inner, own, torch.float32) for codec, inner, own in self._both(payload, state)
        )
        return (first + second).to(dtype)

    @property
    def reads_codes(self) -> bool:
        """Where both do."""
        return self.first.reads_codes and self.second.reads_codes

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """The sum of both."""
        first, second = (c.scores(query, inner, own) for c, inner, own in self._both(payload, state))
        return first + second

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """The sum of both."""
        first, second = (c.mix(weights, inner, own) for c, inner, own in self._both(payload, state))
        return first + second

    def _both(self, payload: Payload, state: State) -> Iterator[tuple[Codec, Payload, State]]:
        """Each codec with its payload and state."""
        for name, codec in (("first", self.first), ("second", self.second)):
            yield codec, Payload(inside(name, payload.tensors), payload.shape), inside(name, state)
