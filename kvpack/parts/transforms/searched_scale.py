"""Divide every channel by a factor, chosen by trial so that rounding the weights costs least."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.lazy import torch
from kvpack.core.roles import Codec, DiagonalTransform, Transform
from kvpack.core.types import Stat, State, Stats

if TYPE_CHECKING:
    from torch import Tensor

_STATS = (Stat("channel_magnitude"), Stat("head_gram"), Stat("weight", of="consumers"))


@dataclass(frozen=True)
class SearchedScale(DiagonalTransform):
    """x / s with s = mean|x|^a / mean|w|^(1-a), the a of `steps` in [0, 1] that loses least.

    What is lost is the squared error of the outputs of all layers that read x, their weights being
    Q(W s) / s with the codec that the first of them gets. mean|w| is taken over the rows, each
    relative to the largest weight of its group of `group` channels (0: of its row); without
    `weigh_weights` s = mean|x|^a. Changing nothing is tried as well. Behind attention, heads are
    looked at one by one. State: "factor" float32 [K, D]. `codec` is filled in by the plan.

    Source: AWQ, arXiv 2306.00978, section 3.2. Deviation: the official code measures the error
    behind the whole attention or MLP block.
    """

    steps: int = field(default=20, metadata={"minimum": 1})
    weigh_weights: bool = True
    group: int = field(default=128, metadata={"minimum": 0})
    codec: Codec | None = None

    def for_codec(self, codec: Codec | None) -> Transform:
        """The search for this codec.

        Raises:
            RecipeError: no layer here is packed, or the codec cannot encode on its own.
        """
        wanted = self.codec or codec
        if wanted is None:
            raise RecipeError("searched_scale has nothing to search for: no layer that reads this is packed")
        if wanted.requires() or wanted.state_spec((1, 4 * wanted.token_block, 256)):
            raise RecipeError(
                f"searched_scale cannot try out codec {type(wanted).__name__}",
                why="it has to learn from each weight",
                hint="give the transform a codec of its own, such as {kind: affine, bits: 4}",
            )
        return replace(self, codec=wanted)

    def requires(self) -> frozenset[Stat]:
        """Mean magnitudes, Gram matrices, and the weights that read the channels."""
        return frozenset(_STATS)

    def fit(self, stats: Stats) -> State:
        """Try all factors.

        Raises:
            KvpackError: a statistic is missing or not finite.
        """
        if missing := [stat.name for stat in _STATS if stat.name not in stats]:
            raise KvpackError(f"the statistic {missing[0]!r} is missing", hint="calibrate first")
        gram, weight = stats["head_gram"]["gram"], stats["consumers.weight"]["weight"]
        found = stats["channel_magnitude"]
        magnitude = found["sum"] / found["count"].clamp(min=1)
        if not bool(gram.isfinite().all() and weight.isfinite().all()):
            raise KvpackError(
                "inputs or weights are not finite", hint="calibrate again with sound text and weights"
            )
        best, least = torch.ones_like(magnitude, dtype=torch.float32), float("inf")
        for factor in (best, *self._candidates(magnitude, weight)):
            loss = self._loss(weight, gram, factor)
            if loss < least:
                best, least = factor, loss
        return {"factor": best}

    def _candidates(self, magnitude: Tensor, weight: Tensor) -> list[Tensor]:
        share = ops.channel_factors.relative_magnitude(weight, self.group) if self.weigh_weights else None
        live = magnitude > 0
        if share is not None:
            live &= share > 0
        found = []
        for step in range(1, self.steps + 1):
            a = step / self.steps
            raw = torch.where(live, magnitude, 1.0) ** a
            if share is not None:
                raw = raw / torch.where(live, share, 1.0) ** (1 - a)
            found.append(ops.channel_factors.centred(raw, live))
        return found

    def _loss(self, weight: Tensor, gram: Tensor, factor: Tensor) -> float:
        """Squared error of the outputs, summed over tokens."""
        if self.codec is None:
            raise KvpackError("searched_scale got no codec", hint="this is a defect; please report it")
        wide = factor.unsqueeze(-2)
        rounded = self.codec.decode(self.codec.encode(weight * wide, {}), {}, torch.float32) / wide
        return ops.channel_factors.output_energy(weight - rounded, gram)
