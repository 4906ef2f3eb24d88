"""Pruning and rounding in one sweep: later columns absorb the errors of both.

With inv(G) = U^T U for the damped Gram matrix G of a layer's inputs, dropping weight w_ij costs
w_ij^2 / U_jj^2 at least. The sweep of GPTQ goes through the columns from left to right. When it
reaches a group of M, each row keeps the N weights that would cost most, as corrected by then; a
pruned column passes on its error w/U_jj, a kept one (w - q)/U_jj. Sources: SparseGPT, arXiv
2301.00774, algorithm 1; GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpack.ops import gptq, masks

Grid = dict[str, Tensor]


@dataclass(frozen=True)
class Rounding:
    """How kept columns are coded: `size` kept columns share a grid. Functions as of `gptq.solve`."""

    size: int
    fit: Callable[[Tensor], Grid]
    snap: Callable[[Tensor, Grid], Tensor]
    value: Callable[[Tensor, Grid], Tensor]


@dataclass(frozen=True)
class Swept:
    """What a sweep chose: which columns every row keeps, bool [R, C], and their weights [R, C*N/M].

    `codes` uint8 and the `grid` of all groups stand for the weights where there was a `Rounding`;
    without one the weights are those that the sweep met when it passed.
    """

    kept: Tensor
    weights: Tensor
    codes: Tensor
    grid: Grid


def sweep(
    weight: Tensor,
    upper: Tensor,
    metric: Tensor,
    keep: int,
    of: int,
    rounding: Rounding | None = None,
    *,
    kept: Tensor | None = None,
    block: int = 128,
) -> Swept:
    """Prune `weight` to `keep` of every `of` columns, and round what is kept.

    A group's grid is fitted when the sweep reaches its first column, to what would be kept by then.

    Args:
        weight: float32 [R, C], C a multiple of `of`.
        upper: `gptq.inverse_factor` of the Gram matrix [C, C].
        metric: what dropping a weight of one costs, [C]: 1 / U_jj^2 in SparseGPT.
        keep: N.
        of: M.
        rounding: how to code what is kept; None to prune only.
        kept: bool [R, C] of a mask that is given; None to choose it.
        block: columns whose corrections to the rest are applied together.
    """
    columns = weight.shape[1]
    size = columns if rounding is None else min(columns, rounding.size * of // keep)
    work = weight.T.contiguous()
    upper, cost = upper.to(work.dtype), metric.to(work.dtype).unsqueeze(1)
    mask = torch.zeros_like(work, dtype=torch.bool) if kept is None else kept.T.contiguous()
    final, codes, grids = torch.zeros_like(work), torch.zeros_like(work, dtype=torch.uint8), []

    def choose(first: int, last: int) -> None:
        if kept is None:
            score = work[first:last].square() * cost[first:last]
            mask[first:last] = masks.largest(score.T, keep, of).T

    for start, stop in gptq.blocks(columns, size, -(-block // of) * of):
        errors = torch.empty_like(work[start:stop])
        for i in range(start, stop):
            if rounding is not None and i % size == 0:
                choose(i, min(i + size, columns))
                grids.append(rounding.fit(_kept(work[i : i + size], mask[i : i + size])))
            if i % of == 0:
                choose(i, i + of)
            passed = work[i]
            if rounding is not None:
                codes[i], passed = _rounded(passed, grids[-1], rounding)
            final[i] = torch.where(mask[i], passed, 0.0)
            errors[i - start] = (work[i] - final[i]) / upper[i, i]
            work[i + 1 : stop] -= torch.outer(upper[i, i + 1 : stop], errors[i - start])
        work[stop:] -= upper[start:stop, stop:].T @ errors
    grid = {name: torch.cat([one[name] for one in grids], -1) for name in (grids[0] if grids else {})}
    return Swept(mask.T.contiguous(), _kept(final, mask), _kept(codes, mask), grid)


def _rounded(column: Tensor, grid: Grid, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Codes and values [R] of a column on the grids of its rows."""
    codes = rounding.snap(column.unsqueeze(1), grid)
    return codes[:, 0], rounding.value(codes, grid)[:, 0]


def _kept(columns: Tensor, mask: Tensor) -> Tensor:
    """What rows keep of columns that lie along the first axis, [R, n]."""
    return masks.closed(columns.T, mask.T)


def padded(upper: Tensor, columns: int) -> Tensor:
    """A factor [C, C] for `columns` columns, of which those beyond C are on their own."""
    known = upper.shape[0]
    whole = torch.eye(columns, dtype=upper.dtype, device=upper.device)
    whole[:known, :known] = upper
    return whole
