"""Sort channels by their mean, so that neighbours have similar values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack.core.errors import KvpackError
from kvpack.core.lazy import torch
from kvpack.core.roles import RowTransform
from kvpack.core.rows import Place
from kvpack.core.types import Shape, Site, Stat, State, Stats, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ChannelReorder(RowTransform):
    """Permutes all K*D channels of a layer by ascending signed mean over the calibration tokens.

    A group of neighbouring channels then spans a narrower range. Channels may move between heads,
    so the output has one head of K*D channels and there is no dual. State: "perm" int32 [K, D],
    the source channel k*D + d of every output channel; its shape remembers the heads. Source:
    RotateKV, arXiv 2501.16383, algorithm 1.
    """

    def requires(self) -> frozenset[Stat]:
        """Sums of every channel of the input."""
        return frozenset({Stat("channel_sum")})

    def fit(self, stats: Stats) -> State:
        """Sort channels by their sums, ties in their original order.

        Raises:
            KvpackError: the sums are missing or not finite.
        """
        sums = stats["channel_sum"]["sum"] if "channel_sum" in stats else None
        if sums is None or not bool(sums.isfinite().all()):
            state = "were not measured" if sums is None else "are not finite"
            raise KvpackError(f"the channel sums {state}", hint="calibrate again with sound text and weights")
        order = torch.argsort(sums.flatten(), stable=True)
        return {"perm": order.to(torch.int32).reshape(sums.shape)}

    def shape(self, shape: Shape) -> Shape:
        """[B, K, T, D] -> [B, 1, T, K*D]."""
        batch, heads, tokens, channels = shape
        return (batch, 1, tokens, heads * channels)

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """The permutation, one entry per channel."""
        return {"perm": TensorSpec((shape[-3], shape[-1]), "int32")}

    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Merge all heads and permute their channels."""
        merged = x.float().transpose(1, 2).flatten(2)
        return merged.index_select(-1, state["perm"].flatten()).unsqueeze(1)

    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Put every channel back into its head."""
        merged = z.float().squeeze(1)
        x = torch.empty_like(merged).index_copy_(-1, state["perm"].flatten().long(), merged)
        return torch.unflatten(x, -1, tuple(state["perm"].shape)).transpose(1, 2)

    def row_steps(self, state: State, at: Site, channels: int) -> tuple[Place]:
        """The order that undoes the permutation."""
        return (Place(state["perm"].flatten().argsort()),)
