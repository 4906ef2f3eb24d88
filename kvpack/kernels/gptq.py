"""The sweep of GPTQ over evenly spaced grids, a block of columns at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvpack import ops
from kvpack.core.types import EvenGrid
from kvpack.kernels import choice
from kvpack.ops.gptq import Grid


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
    even: Callable[[Grid], EvenGrid | None] | None = None,
) -> tuple[Tensor, Grid]:
    """See `kvpack.ops.gptq.solve`; `even` describes evenly spaced grids, as `GridCodec.even`."""

    def rounder(work: Tensor, triangle: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        if fast and even is not None and even(grids[0]) is not None:
            from kvpack.kernels.cpu import gptq

            return gptq.round_columns(work, triangle, grids, even=even)
        return ops.gptq.round_columns(work, triangle, grids, snap=snap, value=value)

    fast = weight.dtype == torch.float32 and choice.on_cpu(weight, upper)
    return ops.gptq.solve(
        weight, upper, group_size, fit, snap, value, order=order, block=block, rounder=rounder
    )
