"""Choosing the codes of one weight from what was measured for it, and measuring what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvpack import ops
from kvpack.calibrate.collect import InputStats
from kvpack.core.errors import KvpackError
from kvpack.core.types import Payload, Solution, State, Stats
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


def solve_all(
    weights: Mapping[str, WeightPlan], sources: Mapping[str, Tensor], inputs: InputStats, dtype: torch.dtype
) -> Iterator[tuple[str, Solved]]:
    """Encode the layers of a block, and decode them again in the model's `dtype`.

    Layers that are given the same input follow each other, so that its statistics are finished once.
    Their rows are solved as one matrix where solver and codec are the same and look at one row at a time.

    Args:
        weights: the packed layers.
        sources: their weights [R, C] float32.
        inputs: what was measured.
        dtype: of the approximations.

    Raises:
        KvpackError: there is nothing measured for a layer that needs it.
    """
    for names in _together(weights, inputs):
        weight, stats = weights[names[0]], stats_for(names[0], inputs, weights, sources)
        if inputs.wanted.get(names[0]) and not stats:
            raise KvpackError(f"{names[0]} was never used by its block", hint="keep it out of the recipe")
        if len(names) == 1:
            yield names[0], solve(weight, sources[names[0]], stats, dtype)
            continue
        whole = weight.solver.solve(torch.cat([sources[name] for name in names]), weight.codec, stats)
        for name, solution in zip(names, _cut(whole, [len(sources[name]) for name in names]), strict=True):
            yield name, _judged(weights[name], sources[name], solution, stats, dtype)


def _together(weights: Mapping[str, WeightPlan], inputs: InputStats) -> list[list[str]]:
    """Names of layers, in lists of those that are solved as one matrix."""
    found: list[list[str]] = []
    for name in sorted(weights, key=inputs.leader):
        weight, last = weights[name], found[-1][-1] if found else name
        fits = (weight.solver, weight.codec) == (weights[last].solver, weights[last].codec)
        same = last != name and inputs.leader(name) == inputs.leader(last) != ""
        if fits and same and weight.solver.stacks(weight.codec):
            found[-1].append(name)
        else:
            found.append([name])
    return found


def _cut(whole: Solution, rows: Sequence[int]) -> Iterator[Solution]:
    """Solutions of matrices that were stacked, each with its own memory."""
    start = 0
    for count in rows:
        part = whole.payload.rows(start, start + count)
        yield Solution(Payload({n: t.clone() for n, t in part.tensors.items()}, part.shape), whole.state)
        start += count


def solve(weight: WeightPlan, matrix: Tensor, stats: Stats, dtype: torch.dtype) -> Solved:
    """Encode `matrix` [R, C] float32 and decode it again, in the model's `dtype`."""
    return _judged(weight, matrix, weight.solver.solve(matrix, weight.codec, stats), stats, dtype)


def _judged(
    weight: WeightPlan, matrix: Tensor, solution: Solution, stats: Stats, dtype: torch.dtype
) -> Solved:
    approximation = weight.codec.decode(solution.payload, solution.state, dtype)
    error = None
    if "gram" in stats:
        gram = stats["gram"]["gram"]
        whole = _energy(matrix, gram)
        error = (_energy(matrix - approximation.float(), gram) / whole) ** 0.5 if whole > 0 else 0.0
    return Solved(solution, approximation, error)


def _energy(rows: Tensor, gram: Tensor) -> float:
    """||X rows^T||^2."""
    return float(ops.layer_outputs.energies(rows, gram).sum())
