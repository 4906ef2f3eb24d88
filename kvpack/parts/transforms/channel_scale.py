"""Divide every channel by a factor of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kvpack.core.errors import KvpackError
from kvpack.core.lazy import torch
from kvpack.core.roles import DiagonalTransform
from kvpack.core.types import Stat, State, Stats


@dataclass(frozen=True)
class ChannelScale(DiagonalTransform):
    """k / lambda with lambda = max|k|^alpha over calibration tokens, per kv head and channel.

    Queries are multiplied by lambda instead, so outlier channels move to where nothing is
    quantised. Channels that RoPE turns together share the larger of both, so that the scale
    commutes with RoPE. A channel that was always 0 has factor 1. State: "factor" float32 [K, D].
    Source: SmoothAttention of QServe, arXiv 2405.04532, section 4.2.
    """

    commutes_with_rope: ClassVar[bool] = True
    alpha: float = field(default=0.5, metadata={"minimum": 0.0, "maximum": 1.0})

    def requires(self) -> frozenset[Stat]:
        """The range of every channel, and which channels RoPE turns together."""
        return frozenset({Stat("channel_range"), Stat("partner", of="rope")})

    def fit(self, stats: Stats) -> State:
        """The factors of one layer.

        Raises:
            KvpackError: the ranges are missing or not finite.
        """
        if "channel_range" not in stats or "rope.partner" not in stats:
            raise KvpackError("the channel ranges were not measured", hint="calibrate first")
        found = stats["channel_range"]
        peak = torch.maximum(found["low"].abs(), found["high"].abs())
        if not bool(peak.isfinite().all()):
            raise KvpackError(
                "the channel ranges are not finite", hint="calibrate again with sound text and weights"
            )
        peak = torch.maximum(peak, peak[:, stats["rope.partner"]["partner"]])
        factor = torch.where(peak > 0, peak, 1.0).double() ** self.alpha
        return {"factor": factor.float()}
