"""Grids whose range is cut where that loses least.

A group of numbers w with the range [m, M] is given the grid of [beta*m, gamma*M], and of all pairs
(gamma, beta) the one with the least loss is taken. With d = w - Q(w) the loss is sum_k h_k d_k^2 for
a metric h [n], or d^T H d for a metric H [n, n]. Where zero lies outside of [m, M] the range shrinks
towards the end that is nearest to zero.

Sources: MLWQ, EMNLP 2025, section 3.4 (two strengths, plain squares); AWQ, arXiv 2306.00978, section
3 (one strength, outputs: H is the Gram matrix of the group's inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Grid = dict[str, Tensor]
Pair = tuple[float, float]

PIECE_ELEMENTS = 1 << 16
"""Numbers that are tried together: small enough to stay in a processor's cache."""


class Grids(Protocol):
    """What a search needs of a codec: see `kvpack.core.roles.GridCodec`."""

    def group_size(self, channels: int) -> int:
        """Channels that share a grid."""

    def grid(self, x: Tensor) -> Grid:
        """The grid of a group, given by its least and its greatest number."""

    def snap(self, x: Tensor, grid: Grid) -> Tensor:
        """Nearest codes."""

    def value(self, codes: Tensor, grid: Grid) -> Tensor:
        """What codes stand for."""


def pairs(steps: int, least: float, *, independent: bool) -> tuple[Pair, ...]:
    """Strengths (gamma, beta) to try: `steps` from 1 down to `least`, for both ends alone or together."""
    if steps < 2:
        return ((1.0, 1.0),)
    strengths = [1.0 - (1.0 - least) * i / (steps - 1) for i in range(steps)]
    if not independent:
        return tuple((s, s) for s in strengths)
    return tuple((gamma, beta) for gamma in strengths for beta in strengths)


def search(x: Tensor, metric: Tensor, grids: Grids, tried: Sequence[Pair]) -> Grid:
    """The grid of one group in every row.

    Memory stays near that of `x`, and time is linear in its size: some rows are tried at a time.

    Args:
        x: float32 [R, n], one group.
        metric: what an error costs, [n] or [n, n].
        grids: how a group is coded.
        tried: pairs (gamma, beta); the first of equally good ones is taken.

    Returns:
        As `grids.grid` gives it: tensors [R, 1].
    """
    if (len(tried) == 1 and tried[0] == (1.0, 1.0)) or grids.group_size(2) < 2:
        return grids.grid(x)
    pieces = [_search(part, metric.to(x.dtype), grids, tried) for part in torch.split(x, _rows(x.shape[1]))]
    return {name: torch.cat([piece[name] for piece in pieces], -2) for name in pieces[0]}


def fitter(metric: Tensor, size: int, grids: Grids, tried: Sequence[Pair]) -> Callable[[Tensor], Grid]:
    """`search` as `kvpack.ops.gptq.solve` calls it: group after group, from left to right.

    Args:
        metric: [C], for all columns.
        size: columns of a group.
        grids: how a group is coded.
        tried: pairs (gamma, beta).
    """
    parts = iter(torch.split(metric, size))
    return lambda columns: search(columns, next(parts), grids, tried)


def fit(x: Tensor, metric: Tensor, grids: Grids, tried: Sequence[Pair]) -> Grid:
    """The grid of all groups of `x` [R, C]; `metric` [C] or [C, C], of which only blocks are read."""
    found, size = [], grids.group_size(x.shape[1])
    for start in range(0, x.shape[1], size):
        here = slice(start, start + size)
        local = metric[here] if metric.dim() == 1 else metric[here, here]
        found.append(search(x[:, here], local, grids, tried))
    return {name: torch.cat([grid[name] for grid in found], -1) for name in found[0]}


def _rows(columns: int) -> int:
    return max(1, PIECE_ELEMENTS // columns)


def _search(x: Tensor, metric: Tensor, grids: Grids, tried: Sequence[Pair]) -> Grid:
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    centre = torch.zeros_like(low).clamp(low, high)
    least = torch.full_like(low, torch.inf)
    best = torch.cat((low, high), 1)
    for gamma, beta in tried:
        ends = torch.cat((torch.lerp(centre, low, beta), torch.lerp(centre, high, gamma)), 1)
        grid = grids.grid(ends)
        loss = _loss(grids.value(grids.snap(x, grid), grid).sub_(x), metric)
        better = loss < least
        least, best = torch.where(better, loss, least), torch.where(better, ends, best)
    return grids.grid(best)


def _loss(error: Tensor, metric: Tensor) -> Tensor:
    """[R, 1], for errors [R, n]."""
    if metric.dim() == 1:
        return error.square_() @ metric.unsqueeze(1)
    return ((error @ metric) * error).sum(1, keepdim=True)
