"""A threshold per channel: what matters little there may be larger before it is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.lazy import torch
from kvpack.core.roles import Thresholds
from kvpack.core.roles.sparsity import NEVER
from kvpack.core.types import Stat, State, Stats

if TYPE_CHECKING:
    from torch import Tensor

FAINTEST = 1e-6
"""Least importance of a channel that ever mattered, relative to the mean."""


@dataclass(frozen=True)
class Channelwise(Thresholds):
    """A number x_i of channel i is kept where ``|x_i| >= tau / u_i``.

    u_i is the mean magnitude of what x_i is multiplied with (the up projection, for the activated
    gate of an FFN), so that ``|x_i| u_i`` stands for the damage of leaving it out; tau is the
    (1 - keep_fraction) quantile of that. With `column_norms`, and always where x_i is multiplied
    with nothing, u_i is also multiplied with the norm of column i of the matrix that reads it.
    Channels with u_i = 0 never mattered on the calibration text and are always left out; other u_i
    are at least 1e-6 of the mean.

    Source: CHESS, arXiv 2409.01366, section 4.1; `column_norms` is not in the paper.
    """

    keep_fraction: float = field(default=0.5, metadata={"minimum": 0.01, "maximum": 1.0})
    column_norms: bool = False

    def requires(self) -> frozenset[Stat]:
        """Magnitudes here, of the factor, and the matrix that reads both."""
        factor, reader = Stat("channel_magnitude", of="factor"), Stat("weight", of="consumers")
        return super().requires() | {factor, reader}

    def width(self, channels: int) -> int:
        """One per channel."""
        return channels

    def fit(self, stats: Stats) -> State:
        """Find tau, then divide it by every channel's importance."""
        counts, importance = stats["magnitudes"]["counts"], self._importance(stats)
        tau = ops.thresholds.cut(counts, importance, self.keep_fraction)
        never = torch.where(importance > 0, 0.0, NEVER) if self.keep_fraction < 1 else importance * 0
        found = torch.where(importance > 0, tau / importance.clamp(min=1e-300), never)
        return {"threshold": found.clamp(max=NEVER).bfloat16()}

    def _importance(self, stats: Stats) -> Tensor:
        """What a unit in each channel changes, float64 [C]."""
        norms = stats["consumers.weight"]["weight"].double().norm(dim=0)
        if "factor.channel_magnitude" not in stats:
            found = norms
        else:
            factor = stats["factor.channel_magnitude"]
            found = factor["sum"].double().flatten() / int(factor["count"])
            found = found * norms if self.column_norms else found
        return torch.where(found > 0, found.clamp(min=FAINTEST * float(found.mean())), 0.0)
