"""Divide every channel by its magnitude, then encode whole tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.lazy import torch
from kvpack.core.nested import inside, prefixed
from kvpack.core.roles import Codec
from kvpack.core.types import Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

SEGMENT_TOKENS = 4096
STEP_TOKENS = 4
"""More than one token, so that policies empty their window as a whole instead of token by token."""


@dataclass(frozen=True)
class ChannelSeparable(Codec):
    """``X = c * codec(X / c)`` with ``c_j = sqrt(max_t |X_tj|)`` over the tokens of a segment.

    A segment is what is encoded at once, up to 4096 tokens. With `merge_heads`, `codec` gets the
    heads side by side as one vector per token, so that a group over all channels has one scale per
    token. A channel that is zero has c = 1; c is stored as float16 and rounded before it divides.

    Payload: "channel_scale" float16 [B, K, 1, D] and what `codec` makes of [B, 1, T, K*D], named
    "codec.…". Source: ZipCache, arXiv 2405.14256, section 4.1, equation 6.

    Raises:
        RecipeError: `codec` wants statistics, which nobody measures on divided channels.
    """

    codec: Codec
    merge_heads: bool = True

    def __post_init__(self) -> None:
        if self.codec.requires():
            raise RecipeError(
                f"codec {type(self.codec).__name__} cannot encode separated channels",
                why="it learns from calibration, which measures the plane as it is",
                hint="use a codec that learns nothing",
            )

    @property
    def token_block(self) -> int:
        """That of `codec`, in steps of four tokens."""
        return math.lcm(self.codec.token_block, STEP_TOKENS)

    @property
    def segment(self) -> int:
        """4096 tokens, or less where `codec` has segments."""
        return min(SEGMENT_TOKENS, self.codec.segment or SEGMENT_TOKENS)

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Channel scales, and the payload of `codec`, which receives float32."""
        inner = self.codec.spec(self._inner(shape), "float32")
        scale = TensorSpec((*shape[:-2], min(1, shape[-2]), shape[-1]), "float16")
        return {"channel_scale": scale, **prefixed("codec", inner)}

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Divide, then encode."""
        scale = self._scale(x, valid)
        divided = self._merged(x.float() / scale.float())
        payload = self.codec.encode(divided, {}, valid)
        tensors = {"channel_scale": scale, **prefixed("codec", payload.tensors)}
        return Payload(tensors, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """Decode, then multiply."""
        inner = Payload(inside("codec", payload.tensors), self._inner(payload.shape))
        x = self.codec.decode(inner, {}, torch.float32)
        if self._inner(payload.shape) != payload.shape:
            heads = torch.unflatten(x.squeeze(-3), -1, (payload.shape[-3], payload.shape[-1]))
            x = heads.transpose(-3, -2)
        return (x * payload.tensors["channel_scale"].float()).to(dtype)

    def _inner(self, shape: Shape) -> Shape:
        if not self.merge_heads or len(shape) < 3:
            return shape
        *outer, heads, tokens, channels = shape
        return (*outer, 1, tokens, heads * channels)

    def _merged(self, x: Tensor) -> Tensor:
        if self._inner(tuple(x.shape)) == tuple(x.shape):
            return x
        return x.transpose(-3, -2).flatten(-2).unsqueeze(-3)

    def _scale(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Root of each channel's largest magnitude, float16 [..., 1, D]."""
        size = x.float().abs()
        if valid is not None:
            size = size.masked_fill(~ops.rows.mask(valid, x), 0.0)
        scale = size.amax(-2, keepdim=True).sqrt().clamp(max=torch.finfo(torch.float16).max).half()
        return torch.where(scale > 0, scale, torch.ones_like(scale))
