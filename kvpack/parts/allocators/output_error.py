"""Squared errors of a layer's outputs, weighted by how much the model's loss feels them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import KvpackError
from kvpack.core.roles import Allocator
from kvpack.core.types import Stat, State, Stats

if TYPE_CHECKING:
    from torch import Tensor

_GRADIENT = Stat("channel_square", of="output_gradient")


@dataclass(frozen=True)
class OutputError(Allocator):
    """The mean over tokens of (y - y_hat)^2, y = W x, summed over outputs.

    `weight_by` makes layers comparable. "gradient": every output counts by the mean square of the
    loss's gradient there, halved, which estimates the KL divergence in nats that the error causes:
    the second-order term with the empirical Fisher information as Hessian, outputs and tokens taken
    for independent. "output": relative to the mean square of the layer's outputs. "none": as it is.

    Sources: the Fisher information as Hessian of the KL divergence is textbook (Amari, 1998); its
    split into an input and a gradient side K-FAC, arXiv 1503.05671, section 3, of which the gradient
    side is kept as a diagonal.
    """

    weight_by: Literal["gradient", "output", "none"] = "gradient"

    def requires(self) -> frozenset[Stat]:
        """The input's Gram matrix, and squares of the output's gradient where they weigh."""
        gradient = {_GRADIENT} if self.weight_by == "gradient" else set()
        return frozenset({Stat("gram"), *gradient})

    def loss(self, weight: Tensor, approximation: Tensor, stats: Stats) -> float:
        """The weighted error; errors as of the role."""
        inputs = _found(stats, "gram")
        gram, count = inputs["gram"], float(inputs["count"])
        errors = ops.layer_outputs.energies(weight - approximation, gram) / count
        if self.weight_by == "gradient":
            found = _found(stats, _GRADIENT.name)
            # A layer that a token may pass by (an expert) counts by the tokens it has seen.
            felt = found["squares"][0] / float(found["count"])
            return float((felt.to(errors) * errors).sum()) / 2
        total = float(errors.sum())
        if self.weight_by == "none":
            return total
        whole = float(ops.layer_outputs.energies(weight, gram).sum()) / count
        return total / whole if whole > 0 else 0.0


def _found(stats: Stats, name: str) -> State:
    if name not in stats:
        raise KvpackError(f"output_error needs the statistic {name!r}", hint="measure the model again")
    return dict(stats[name])
