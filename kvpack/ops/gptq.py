"""GPTQ: choose codes column by column, and let later columns absorb the error of earlier ones.

Source: GPTQ, arXiv 2210.17323, algorithm 1. With G = sum x x^T over calibration inputs and U the
upper Cholesky factor of (G + damp*mean(diag G)*I)^-1, rounding column i by e = (w_i - q_i)/U_ii
changes the others by -e U_ij, which is the least-squares optimal answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Grid = dict[str, Tensor]
Rounder = Callable[[Tensor, Tensor, Sequence[Grid]], tuple[Tensor, Tensor]]
"""See `round_columns`."""

SMALL = 128
"""Rows of a triangle that is inverted at one go."""
STEP = 16
"""Columns whose corrections to the rest of their block are applied together."""


def inverse_factor(gram: Tensor, damp: float, limit: float = 1.0) -> Tensor | None:
    """Upper Cholesky factor U of the damped inverse: ``inv(G + damp*mean(diag)*I) == U^T U``.

    U is the inverse of the upper R with R R^T = G + ..., and that is the lower Cholesky factor of the
    matrix read backwards: one factorisation, and one triangle to invert. Damping grows tenfold until it
    succeeds. Channels that were never active get the mean diagonal, which isolates them.

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
        factor, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not bool(failed):
            upper = _inverse_of_lower(factor).flip(0, 1)
            if bool(upper.isfinite().all()):
                return upper
        previous, damp = damp, damp * 10
    return None


def _inverse_of_lower(factor: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, by halves: nearly all work is in products."""
    size = len(factor)
    if size <= SMALL:
        one = torch.eye(size, dtype=factor.dtype, device=factor.device)
        inverse: Tensor = torch.linalg.solve_triangular(factor, one, upper=False)
        return inverse
    half = size // 2
    found = torch.zeros_like(factor)
    first, last = _inverse_of_lower(factor[:half, :half]), _inverse_of_lower(factor[half:, half:])
    found[:half, :half], found[half:, half:] = first, last
    torch.mm(last, factor[half:, :half] @ first, out=found[half:, :half]).neg_()
    return found


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
    rounder: Rounder | None = None,
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
        rounder: rounds a run of columns, `round_columns` with `snap` and `value` by default.

    Returns:
        Codes uint8 [R, C] and the grid of all groups, both in the original column order.
    """
    rounder = rounder or partial(round_columns, snap=snap, value=value)
    sweep = torch.arange(weight.shape[1]) if order is None else order.cpu()
    grids: dict[int, Grid] = {}
    if order is not None:
        grids = {i: fit(part) for i, part in enumerate(torch.split(weight, group_size, 1))}
    # Columns become rows: each step reads one contiguous row.
    work = weight if order is None else weight[:, order]
    work = work.T.clone(memory_format=torch.contiguous_format)
    upper = upper.to(work.dtype)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=weight.device)
    for start, stop in blocks(len(sweep), group_size if order is None else 1, block):
        errors = torch.empty_like(work[start:stop])
        run = group_size if order is None else stop - start
        for first in range(start, stop, run):
            last = min(first + run, stop)
            groups = (sweep[first:last] // group_size).tolist()
            if groups[0] not in grids:
                grids[groups[0]] = fit(work[first : first + group_size].T)
            own = upper[first:last, first:last]
            codes[first:last], lost = rounder(work[first:last], own, [grids[g] for g in groups])
            errors[first - start : last - start] = lost
            work[last:stop].addmm_(upper[first:last, last:stop].T, lost, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    found = codes if order is None else torch.empty_like(codes).index_copy_(0, order, codes)
    return found.T.contiguous(), {n: torch.cat([grids[g][n] for g in sorted(grids)], -1) for n in grids[0]}


def round_columns(
    work: Tensor,
    upper: Tensor,
    grids: Sequence[Grid],
    *,
    snap: Callable[[Tensor, Grid], Tensor],
    value: Callable[[Tensor, Grid], Tensor],
) -> tuple[Tensor, Tensor]:
    """Round n columns, each knowing the errors of those before it.

    Args:
        work: the columns as rows, float32 [n, R]; overwritten.
        upper: their part of the factor [n, n].
        grids: of every column.
        snap: as of `solve`.
        value: as of `solve`.

    Returns:
        Codes uint8 [n, R], and errors over U_ii float32 [n, R].
    """
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    diagonal = upper.diagonal().tolist()
    for first in range(0, len(work), STEP):
        last = min(first + STEP, len(work))
        for i in range(first, last):
            column = work[i].unsqueeze(1)
            chosen = snap(column, grids[i])
            codes[i] = chosen[:, 0]
            errors[i] = torch.sub(column, value(chosen, grids[i]))[:, 0].div_(diagonal[i])
            work[i + 1 : last].addr_(upper[i, i + 1 : last], errors[i], alpha=-1)
        work[last:].addmm_(upper[first:last, last:].T, errors[first:last], alpha=-1)
    return codes, errors


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
