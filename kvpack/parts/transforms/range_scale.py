"""Divide every channel by a factor that shares its range between activations and weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpack import ops
from kvpack.core.errors import KvpackError
from kvpack.core.roles import DiagonalTransform
from kvpack.core.types import Stat, State, Stats


@dataclass(frozen=True)
class RangeScale(DiagonalTransform):
    """x / s with s = max|x|^alpha / max|w|^beta per channel; the weights that read x are multiplied by s.

    The larger alpha, the more of the activations' outliers the weights take over. Factors are
    divided by their geometric mean and kept within `limit` of it on either side; a channel that was
    always 0, or that nobody reads, has factor 1. State: "factor" float32 [K, D].

    Sources: SmoothQuant, arXiv 2211.10438, equation 4 (beta = 1 - alpha); QServe, arXiv 2405.04532,
    section 4.3 (alpha and beta apart).
    """

    alpha: float = field(default=0.5, metadata={"minimum": 0.0, "maximum": 1.0})
    beta: float = field(default=0.5, metadata={"minimum": 0.0, "maximum": 1.0})
    limit: float = field(default=100.0, metadata={"minimum": 1.0})

    def requires(self) -> frozenset[Stat]:
        """The range of every channel, and the weights that read them."""
        return frozenset({Stat("channel_range"), Stat("weight", of="consumers")})

    def fit(self, stats: Stats) -> State:
        """The factors of one place.

        Raises:
            KvpackError: a statistic is missing or not finite.
        """
        try:
            peak, weight = ops.channel_factors.peaks(stats)
        except (KeyError, ValueError) as error:
            raise KvpackError(
                f"range_scale cannot be fitted: {error}",
                hint="calibrate again with sound text and weights",
            ) from error
        return {"factor": ops.channel_factors.balanced(peak, weight, self.alpha, self.beta, self.limit)}
