"""GPTQ: choose codes column by column, and let later columns absorb the error of earlier ones.

Source: GPTQ, arXiv 2210.17323, algorithm 1. With G = sum x x^T over calibration inputs and U the
upper Cholesky factor of (G + damp*mean(diag G)*I)^-1, rounding column i by e = (w_i - q_i)/U_ii
changes the others by -e U_ij, which is the least-squares optimal answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Grid = dict[str, Tensor]


def inverse_factor(gram: Tensor, damp: float, limit: float = 1.0) -> Tensor | None:
    """Upper Cholesky factor U of the damped inverse: ``inv(G + damp*mean(diag)*I) == U^T U``.

    Damping grows tenfold until the factorisation succeeds. Channels that were never active get the
    mean diagonal, which isolates them.

    Args:
        gram: [C, C], finite.
        damp: first damping, relative to the mean of the diagonal.
        limit: last damping that is tried.

    Returns:
        [C, C] in the dtype of `gram`; None when no damping up to `limit` suffices.
    """
    gram = gram.clone()
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    diagonal[dead] = mean
    previous = 0.0
    while damp <= limit * (1 + 1e-9):
        diagonal += (damp - previous) * mean
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not bool(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not bool(failed):
                return upper
        previous, damp = damp, damp * 10
    return None


def solve(
    weight: Tensor,
    upper: Tensor,
    group_size: int,
    fit: Callable[[Tensor], Grid],
    snap: Callable[[Tensor, Grid], Tensor],
    value: Callable[[Tensor, Grid], Tensor],
    *,
    order: Tensor | None = None,
    block: int = 128,
) -> tuple[Tensor, Grid]:
    """Round `weight` to a grid.

    A group's grid is fitted when the sweep reaches its first column, to the weights as corrected by
    then. With an `order` the sweep jumps between groups, so all grids are fitted to the original
    weights beforehand.

    Args:
        weight: float32 [R, C].
        upper: `inverse_factor` of the Gram matrix, its rows and columns in `order` when given.
        group_size: columns that share a grid entry; a last group may be smaller.
        fit: grid of some columns [R, n] of one group, every tensor [..., 1].
        snap: codes uint8 [R, n] of columns on a grid.
        value: numbers float32 [R, n] that codes stand for.
        order: permutation of the columns in which they are swept.
        block: columns whose corrections to the rest are applied together.

    Returns:
        Codes uint8 [R, C] and the grid of all groups, both in the original column order.
    """
    sweep = list(range(weight.shape[1])) if order is None else order.tolist()
    grids: dict[int, Grid] = {}
    if order is not None:
        grids = {i: fit(part) for i, part in enumerate(torch.split(weight, group_size, 1))}
    # Columns become rows: each step reads one contiguous row.
    work = weight[:, sweep].T.contiguous()
    upper = upper.to(work.dtype)
    diagonal = upper.diagonal().tolist()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=weight.device)
    for start, stop in blocks(len(sweep), group_size if order is None else 1, block):
        errors = torch.empty_like(work[start:stop])
        for i in range(start, stop):
            group = sweep[i] // group_size
            if group not in grids:
                grids[group] = fit(work[i : i + group_size].T)
            column = work[i].unsqueeze(1)
            chosen = snap(column, grids[group])
            codes[sweep[i]] = chosen[:, 0]
            error = (column - value(chosen, grids[group]))[:, 0].div_(diagonal[i])
            work[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous(), {n: torch.cat([grids[g][n] for g in sorted(grids)], -1) for n in grids[0]}


def blocks(columns: int, group_size: int, block: int) -> list[tuple[int, int]]:
    """Ranges of about `block` columns; each holds whole groups, or lies within one.

    A grid is fitted to columns that have received every correction so far, so no group may start
    inside a block and end outside it.
    """
    if group_size < block:
        group_size = block = block // group_size * group_size
    return [
        (start, min(start + block, first + group_size, columns))
        for first in range(0, columns, group_size)
        for start in range(first, min(first + group_size, columns), block)
    ]
