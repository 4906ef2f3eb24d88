"""GPTQ's columns on CPUs: the twin of `kvpack.ops.gptq.round_columns`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvpack.core.types import EvenGrid
from kvpack.kernels.cpu import gptq_columns, pool
from kvpack.kernels.cpu.entries import entry
from kvpack.ops.gptq import Grid


def round_columns(
    work: Tensor, upper: Tensor, grids: Sequence[Grid], *, even: Callable[[Grid], EvenGrid | None]
) -> tuple[Tensor, Tensor]:
    """See `kvpack.ops.gptq.round_columns`; `even` gives steps and offsets of every grid."""
    different = {id(grid): grid for grid in grids}
    order = {key: place for place, key in enumerate(different)}
    places = torch.tensor([order[id(grid)] for grid in grids])
    lines = [found for grid in different.values() if (found := even(grid)) is not None]
    rows = work.shape[1]
    step = torch.stack([line.step.expand(rows, 1)[:, 0] for line in lines])
    offset = torch.stack([line.offset.expand(rows, 1)[:, 0] for line in lines])
    work, diagonal = work.contiguous(), upper.diagonal().contiguous()
    shares = upper.T.neg().contiguous()
    codes, errors = torch.empty_like(work), torch.empty_like(work)
    pool.run(
        entry("gptq_columns"),
        -(-rows // gptq_columns.WIDTH),
        gptq_columns.scratch_bytes(len(work)),
        *(len(work), rows, lines[0].levels, int(lines[0].centred)),
        *(t.data_ptr() for t in (work, shares, diagonal, places, step, offset, codes, errors)),
    )
    # By way of int16, because CPUs have no instruction from floats to bytes.
    return codes.to(torch.int16).to(torch.uint8), errors
