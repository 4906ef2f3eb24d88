"""Sort the channels of every head by size, so that those of similar size are neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpack.core.errors import KvpackError
from kvpack.core.lazy import torch
from kvpack.core.roles import Transform
from kvpack.core.types import Shape, Site, Stat, State, Stats, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_STATS = {
    "weight": Stat("weight", of="projection"),
    "rms": Stat("head_gram"),
    "max": Stat("channel_range"),
}


@dataclass(frozen=True)
class ChannelSort(Transform):
    """Permutes the channels of each kv head by ascending size; ties stay in their order.

    `by`: "weight" is the norm of the channel's row in the projection, which needs no data; "rms"
    and "max" are measured on calibration tokens. State: "perm" [K, D], the source of every output
    channel, uint8 where D <= 256, else int16. Source: K-sort, arXiv 2403.20137, section 3.
    """

    permutes: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = True

    by: Literal["weight", "rms", "max"] = "weight"

    def requires(self) -> frozenset[Stat]:
        """What `by` looks at."""
        return frozenset({_STATS[self.by]})

    def fit(self, stats: Stats) -> State:
        """Sort the channels of every head.

        Raises:
            KvpackError: the sizes are missing or not finite.
        """
        name = _STATS[self.by].name
        if name not in stats:
            raise KvpackError(f"the statistic {name!r} is missing", hint="calibrate first")
        size = self._sizes(stats[name])
        if not bool(size.isfinite().all()):
            raise KvpackError(
                "the channel sizes are not finite", hint="calibrate again with sound text and weights"
            )
        dtype = getattr(torch, _index_dtype(size.shape[-1]))
        return {"perm": torch.argsort(size, dim=-1, stable=True).to(dtype)}

    def _sizes(self, found: Mapping[str, Tensor]) -> Tensor:
        """The size of every channel [K, D], up to a common factor and a root."""
        if self.by == "weight":
            return found["weight"].double().square().sum(-1).reshape(int(found["heads"]), -1)
        if self.by == "rms":
            return found["gram"].diagonal(dim1=-2, dim2=-1)
        return torch.maximum(found["low"].abs(), found["high"].abs())

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """The permutations, one entry per channel."""
        return {"perm": TensorSpec((shape[-3], shape[-1]), _index_dtype(shape[-1]))}

    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Permute; `x` may have several heads per kv head."""
        return _gather(x.float(), state["perm"].long())

    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Put every channel back."""
        return _gather(z.float(), state["perm"].long().argsort(-1))

    def dual(self, q: Tensor, state: State, at: Site) -> Tensor:
        """The same permutation."""
        return self.forward(q, state, at)


def _gather(x: Tensor, perm: Tensor) -> Tensor:
    perm = perm.repeat_interleave(x.shape[1] // perm.shape[0], 0)
    return x.gather(-1, perm.unsqueeze(-2).expand(x.shape))


def _index_dtype(channels: int) -> str:
    return "uint8" if channels <= 256 else "int16"
