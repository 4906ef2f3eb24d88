"""One threshold for all channels: the quantile of the magnitudes."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpack import ops
from kvpack.core.lazy import torch
from kvpack.core.roles import Thresholds
from kvpack.core.types import State, Stats


@dataclass(frozen=True)
class Magnitude(Thresholds):
    """A number x is kept where ``|x| >= t``, t the (1 - keep_fraction) quantile of |x|.

    On the activated gate of an FFN this is CATS, arXiv 2404.08763, section 4; on the inputs of
    linear layers TEAL, arXiv 2408.14690, section 4.
    """

    keep_fraction: float = field(default=0.5, metadata={"minimum": 0.01, "maximum": 1.0})

    def width(self, channels: int) -> int:
        """One for all."""
        return 1

    def fit(self, stats: Stats) -> State:
        """The quantile over all channels and tokens."""
        counts = stats["magnitudes"]["counts"].sum(0, keepdim=True)
        return {"threshold": ops.thresholds.cut(counts, torch.ones(1), self.keep_fraction).bfloat16()[None]}
