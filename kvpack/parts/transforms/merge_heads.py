"""All heads of a layer side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack.core.errors import KvpackError
from kvpack.core.lazy import torch
from kvpack.core.roles import RowTransform
from kvpack.core.rows import Step
from kvpack.core.types import Shape, Site, State

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MergeHeads(RowTransform):
    """Turns K heads of D channels into one of K*D, so that a token is one vector for the codec.

    There is no dual: a query head reads the channels of its own kv head only.
    """

    def shape(self, shape: Shape) -> Shape:
        """[B, K, T, D] -> [B, 1, T, K*D]."""
        batch, heads, tokens, channels = shape
        return (batch, 1, tokens, heads * channels)

    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Channel d of head k becomes channel k*D + d."""
        return x.float().transpose(1, 2).flatten(2).unsqueeze(1)

    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Separate the heads.

        Raises:
            KvpackError: `at.kv_heads` does not divide the channels.
        """
        if at.kv_heads < 1 or z.shape[-1] % at.kv_heads:
            raise KvpackError(
                f"layer {at.layer}: {z.shape[-1]} merged channels cannot come from {at.kv_heads} kv heads",
                hint="pass Site(kv_heads=...) of the plane that entered the chain of transforms",
            )
        heads = (at.kv_heads, z.shape[-1] // at.kv_heads)
        return torch.unflatten(z.float().squeeze(1), -1, heads).transpose(1, 2)

    def row_steps(self, state: State, at: Site, channels: int) -> tuple[Step, ...]:
        """None: the heads lie side by side already."""
        return ()

    def gradient(self, g: Tensor, state: State, at: Site) -> Tensor:
        """Gradients move with their channels."""
        return self.forward(g, state, at)
