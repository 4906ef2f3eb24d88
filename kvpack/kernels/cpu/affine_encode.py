"""Encoding on CPUs: the twins of `kvpack.ops.affine_encode`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.kernels.cpu import frames, pool
from kvpack.kernels.cpu.entries import entry
from kvpack.kernels.cpu.tensors import KINDS, zeros
from kvpack.ops.affine import Grid, group_size
from kvpack.ops.bits import packed_size
from kvpack.ops.packed_affine import AffineCodes

_READ = (torch.float32, torch.float16, torch.bfloat16)
_PER_ITEM = 1 << 15
"""Numbers that a thread takes at a time, at least: fewer would take longer to hand out."""


def fits(x: Tensor, axis: str, size: int) -> bool:
    """Whether the kernels can read these numbers: rows in one piece, whole groups, at most two outer axes."""
    if x.dtype not in _READ or not 2 <= x.dim() <= 4 or x.stride(-1) != 1 or not x.numel():
        return False
    return axis != "token" or x.shape[-2] % (size or x.shape[-2]) == 0


def value_range(x: Tensor, axis: str, size: int) -> tuple[Tensor, Tensor]:
    """See `kvpack.ops.affine_encode.value_range`."""
    shape, units, size = _groups(x, axis, size)
    low, high = torch.empty(shape), torch.empty(shape)
    _run(frames.RANGES, x, axis, size, units, low, high, 0, 1, 0, 0, 0)
    return low, high


def codes(x: Tensor, scale: Tensor, zero: Tensor | None, width: int, axis: str, size: int) -> Tensor:
    """See `kvpack.ops.affine_encode.codes`."""
    _, units, size = _groups(x, axis, size)
    out = torch.empty((*x.shape[:-1], packed_size(x.shape[-1], width)), dtype=torch.uint8)
    scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    more = out.data_ptr(), width, KINDS[scale.dtype], zeros(zero), 0
    _run(frames.CODES, x, axis, size, units, scale, scale if zero is None else zero, *more)
    return out


def encode(
    x: Tensor, width: int, zero: str, scale_dtype: torch.dtype, axis: str, size: int
) -> tuple[Tensor, Grid]:
    """See `kvpack.ops.affine_encode.encode`, for ranges that are not clipped."""
    shape, units, size = _groups(x, axis, size)
    out = torch.empty((*x.shape[:-1], packed_size(x.shape[-1], width)), dtype=torch.uint8)
    grid = {"scale": torch.empty(shape, dtype=scale_dtype)}
    if zero != "none":
        narrow = torch.float16 if scale_dtype.itemsize == 1 else scale_dtype
        grid["zero"] = torch.empty(shape, dtype=narrow if zero == "float" else torch.int8)
    more = out.data_ptr(), width, KINDS[scale_dtype], zeros(grid.get("zero")), 0
    second = grid.get("zero", grid["scale"])
    _run(frames.ENCODE, x, axis, size, units, grid["scale"], second, *more)
    return out, grid


def lost(x: Tensor, y: AffineCodes) -> tuple[float, float]:
    """See `kvpack.ops.affine_encode.lost`."""
    _, units, size = _groups(x, y.axis, y.size)
    sums = torch.empty((*x.shape[:-1], 2))
    codes, scale = y.codes.contiguous(), y.scale.contiguous()
    zero = scale if y.zero is None else y.zero.contiguous()
    more = codes.data_ptr(), y.bits, KINDS[scale.dtype], zeros(y.zero), sums.data_ptr()
    _run(frames.LOST, x, y.axis, size, units, scale, zero, *more)
    return _total(sums)


def squares(x: Tensor, other: Tensor) -> tuple[float, float]:
    """See `kvpack.ops.affine_encode.squares`."""
    other, sums = other.contiguous(), torch.empty((*x.shape[:-1], 2))
    more = 0, 1, 0, 0, sums.data_ptr()
    _run(frames.SQUARES, x, "channel", 1, x.numel() // x.shape[-1], other, other, *more)
    return _total(sums)


def _total(sums: Tensor) -> tuple[float, float]:
    lost, whole = sums.double().flatten(0, -2).sum(0).tolist()
    return lost, whole


def _groups(x: Tensor, axis: str, size: int) -> tuple[tuple[int, ...], int, int]:
    """Shape of the grid, how many units the kernel sees, and the size of a group."""
    *outer, tokens, channels = x.shape
    if axis == "token":
        size = size or tokens
        return (*outer, tokens // size, channels), x.numel() // (channels * size), size
    size = group_size(channels, size)
    return (*outer, tokens, -(-channels // size)), x.numel() // channels, size


def _run(
    mode: int,
    x: Tensor,
    axis: str,
    size: int,
    units: int,
    first: Tensor,
    second: Tensor,
    *more: int,
) -> None:
    strides, width = x.stride(), x.element_size()
    b = strides[-4] * width if len(strides) > 3 else 0
    k = strides[-3] * width if len(strides) > 2 else 0
    heads = x.shape[-3] if len(strides) > 2 else 1
    per_item = max(1, _PER_ITEM * units // x.numel())
    pool.run(
        entry("affine_encode_rows"),
        -(-units // per_item),
        frames.encode_scratch(x.shape[-1]),
        *(heads, x.shape[-2], x.shape[-1], x.data_ptr(), b, k, strides[-2] * width, KINDS[x.dtype]),
        *(mode, frames.TOKEN if axis == "token" else frames.CHANNEL, size, units, per_item),
        *(first.data_ptr(), second.data_ptr(), *more),
    )
