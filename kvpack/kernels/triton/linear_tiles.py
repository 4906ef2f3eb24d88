"""What the matrix kernels share: how programs are spread, and how their parts are summed."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit(do_not_specialize=["count", "splits"])
def _sum_parts(parts, out, count, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum over splits of parts[split, i]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS).to(tl.int64)
    mask = (s < splits)[:, None] & (i < count)[None, :]
    x = tl.load(parts + s[:, None] * count + i[None, :], mask=mask, other=0.0)
    tl.store(out + i, tl.sum(x, 0).to(out.dtype.element_ty), mask=i < count)


def split_channels(steps: int, programs: int, device: torch.device, wanted: int | None) -> tuple[int, int]:
    """Programs that share the channels of one tile of outputs, and steps that each of them takes."""
    if wanted is None:
        cores = 4
        if device.type == "cuda":
            cores = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = min(max(1, cores * PROGRAMS_PER_MULTIPROCESSOR // programs), 16)
    each = -(-steps // min(wanted, steps))
    return -(-steps // each), each


def new_parts(rows: int, outputs: int, splits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where the programs write: [splits, rows, outputs], float32 where they are still to be summed."""
    return torch.empty((splits, rows, outputs), dtype=torch.float32 if splits > 1 else dtype, device=device)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The outputs [rows, outputs] in `dtype`."""
    if parts.shape[0] == 1:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    splits, block = parts.shape[0], 256
    _sum_parts[(triton.cdiv(out.numel(), block),)](
        parts, out, out.numel(), splits, SPLITS=triton.next_power_of_2(splits), BLOCK=block, num_warps=4
    )
    return out
