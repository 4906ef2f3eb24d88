"""Choosing the codes of one weight, and measuring what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvpack.core.types import Solution, Stats
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
