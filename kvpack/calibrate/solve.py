"""Choosing the codes of one weight from what was measured for it, and measuring what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvpack.calibrate.collect import InputStats
from kvpack.core.types import Solution, State, Stats
from kvpack.recipe.plan import WeightPlan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Solved:
    """A weight's codes, what they decode to, and the relative error they make in the output.

    `output_error` is ||X (W - W_hat)^T|| / ||X W^T|| on the calibration inputs X, None where no
    Gram matrix was measured.
    """

    solution: Solution
    approximation: Tensor
    output_error: float | None


def stats_for(
    name: str, inputs: InputStats, weights: Mapping[str, WeightPlan], sources: Mapping[str, Tensor]
) -> dict[str, State]:
    """Statistics for the solver of a layer: of its input, and the weights of all that are given the same.

    Args:
        name: of the layer, one of `weights`.
        inputs: what was measured.
        weights: the packed layers of its block.
        sources: their weights [R, C].
    """
    stats = inputs.of(name)
    if stats and any(stat.of == "consumers" for stat in weights[name].solver.requires()):
        together = [other for other in weights if inputs.leader(other) == inputs.leader(name)]
        stats["consumers.weight"] = {"weight": torch.cat([sources[other] for other in together])}
    return stats


def solve(weight: WeightPlan, matrix: Tensor, stats: Stats, dtype: torch.dtype) -> Solved:
    """Encode `matrix` [R, C] float32 and decode it again, in the model's `dtype`."""
    solution = weight.solver.solve(matrix, weight.codec, stats)
    approximation = weight.codec.decode(solution.payload, solution.state, dtype)
    error = None
    if "gram" in stats:
        gram = stats["gram"]["gram"]
        whole = _energy(matrix, gram)
        error = (_energy(matrix - approximation.float(), gram) / whole) ** 0.5 if whole > 0 else 0.0
    return Solved(solution, approximation, error)


def _energy(rows: Tensor, gram: Tensor) -> float:
    """||X rows^T||^2 = trace(rows X^T X rows^T)."""
    return max(0.0, float(((rows @ gram) * rows).sum(dtype=torch.float64)))
