"""GPTQ over columns that are coded in different ways.

Neighbouring columns that share bits and grids are a span. A span is swept as `kvpack.ops.gptq` does;
what it loses, W_s - Q_s, changes the columns behind it by -(W_s - Q_s) U_ss^-1 U_sr, which is what
the column by column corrections -e U_ij add up to, because W_s - Q_s = E U_ss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpack.ops import gptq

Grid = dict[str, Tensor]


@dataclass(frozen=True)
class Span:
    """Neighbouring columns: how many, how many of them share a grid, and how they are coded.

    `fit`, `snap` and `value` are as in `kvpack.ops.gptq.solve`.
    """

    columns: int
    group_size: int
    fit: Callable[[Tensor], Grid]
    snap: Callable[[Tensor, Grid], Tensor]
    value: Callable[[Tensor, Grid], Tensor]


def solve(
    weight: Tensor, upper: Tensor, spans: Sequence[Span], *, block: int = 128
) -> list[tuple[Tensor, Grid]]:
    """Round `weight` to the grids of its spans.

    Args:
        weight: float32 [R, C], columns in the order of the spans.
        upper: `kvpack.ops.gptq.inverse_factor` of the Gram matrix in that order.
        spans: together C columns.
        block: columns whose corrections to the rest of their span are applied together.

    Returns:
        Codes and grids of every span.
    """
    found, start, rest = [], 0, weight
    upper = upper.to(weight.dtype)
    for span in spans:
        here, rest = rest[:, : span.columns], rest[:, span.columns :]
        stop = start + span.columns
        inner = upper[start:stop, start:stop]
        codes, grid = gptq.solve(here, inner, span.group_size, span.fit, span.snap, span.value, block=block)
        found.append((codes, grid))
        if stop < weight.shape[1]:
            carried = torch.linalg.solve_triangular(inner, upper[start:stop, stop:], upper=True)
            rest = rest - (here - span.value(codes, grid)) @ carried
        start = stop
    return found
