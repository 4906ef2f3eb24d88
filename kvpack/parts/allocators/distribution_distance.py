"""How far the distribution of a layer's outputs moves: means and variances per output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import KvpackError
from kvpack.core.roles import Allocator
from kvpack.core.types import Stat, Stats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DistributionDistance(Allocator):
    """(||mu(y) - mu(y_hat)|| + ||var(y) - var(y_hat)||) / R, per output over tokens, y = W x.

    Means and variances follow exactly from the input's mean and Gram matrix, so that every width is
    judged without a pass of its own. Errors that leave both moments alone cost nothing.

    Source: MLWQ (EMNLP 2025, main 408), block-level allocation by inter-layer loss. Deviation: the
    moments are those of all calibration tokens together, not averaged over samples.
    """

    def requires(self) -> frozenset[Stat]:
        """The sum and the Gram matrix of the layer's inputs."""
        return frozenset({Stat("gram"), Stat("channel_sum")})

    def loss(self, weight: Tensor, approximation: Tensor, stats: Stats) -> float:
        """The distance; errors as of the role."""
        if "gram" not in stats or "channel_sum" not in stats:
            raise KvpackError(
                "distribution_distance needs the sum and the Gram matrix of the layer's inputs",
                hint="measure the model again",
            )
        gram, total = stats["gram"]["gram"], stats["channel_sum"]["sum"][0]
        count = int(stats["gram"]["count"])
        exact, moved = (
            ops.layer_outputs.moments(matrix, gram, total, count) for matrix in (weight, approximation)
        )
        apart = (float((a - b).norm()) for a, b in zip(exact, moved, strict=True))
        return sum(apart) / weight.shape[0]
