"""Affine encoding without copies: numbers are read in the dtype they are stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.kernels import choice
from kvpack.ops import affine, affine_encode
from kvpack.ops.packed_affine import AffineCodes


def value_range(x: Tensor, axis: str, size: int) -> tuple[Tensor, Tensor]:
    """See `kvpack.ops.affine_encode.value_range`."""
    if _cpu(x, axis, size):
        from kvpack.kernels.cpu import affine_encode as cpu

        return cpu.value_range(x, axis, size)
    return affine_encode.value_range(x, axis, size)


def codes(x: Tensor, scale: Tensor, zero: Tensor | None, width: int, axis: str, size: int) -> Tensor:
    """See `kvpack.ops.affine_encode.codes`."""
    if choice.on_cpu(scale, zero) and _cpu(x, axis, size):
        from kvpack.kernels.cpu import affine_encode as cpu

        return cpu.codes(x, scale, zero, width, axis, size)
    return affine_encode.codes(x, scale, zero, width, axis, size)


def encode(
    x: Tensor, width: int, zero: str, scale_dtype: torch.dtype, clip: float, axis: str, size: int
) -> tuple[Tensor, affine.Grid]:
    """See `kvpack.ops.affine_encode.encode`."""
    if not _cpu(x, axis, size):
        return affine_encode.encode(x, width, zero, scale_dtype, clip, axis, size)
    from kvpack.kernels.cpu import affine_encode as cpu

    if clip == 1.0:
        return cpu.encode(x, width, zero, scale_dtype, axis, size)
    grid = affine.fit(*cpu.value_range(x, axis, size), width, zero, scale_dtype, clip)
    return cpu.codes(x, grid["scale"], grid.get("zero"), width, axis, size), grid


def lost(x: Tensor, y: AffineCodes) -> tuple[float, float]:
    """See `kvpack.ops.affine_encode.lost`."""
    if choice.on_cpu(y.codes, y.scale, y.zero) and _cpu(x, y.axis, y.size):
        from kvpack.kernels.cpu import affine_encode as cpu

        return cpu.lost(x, y)
    return affine_encode.lost(x, y)


def squares(x: Tensor, other: Tensor) -> tuple[float, float]:
    """See `kvpack.ops.affine_encode.squares`."""
    if other.dtype == torch.float32 and choice.on_cpu(other) and _cpu(x, "channel", 1):
        from kvpack.kernels.cpu import affine_encode as cpu

        return cpu.squares(x, other)
    return affine_encode.squares(x, other)


def _cpu(x: Tensor, axis: str, size: int) -> bool:
    if not choice.on_cpu(x):
        return False
    from kvpack.kernels.cpu import affine_encode as cpu

    return cpu.fits(x, axis, size)
