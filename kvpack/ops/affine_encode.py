"""The passes of affine encoding over all numbers: ranges of groups, packed codes, what they lose.

The reference widens numbers to float32 as a whole; `kvpack.kernels.affine_encode` has twins that read
them as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.ops import affine, bits, packed_affine


def value_range(x: Tensor, axis: str, size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest numbers of every group of `x` [..., T, D], float32.

    Returns:
        Both [..., T, ceil(D/size)] for groups along "channel", [..., T/size, D] along "token"; a
        `size` of 0 is the whole axis. NaN where a group holds NaN; a zero may have either sign.
    """
    return affine.value_range(affine.split(x.float(), axis, size), affine.group_axis(axis))


def encode(
    x: Tensor, width: int, zero: str, scale_dtype: torch.dtype, clip: float, axis: str, size: int
) -> tuple[Tensor, affine.Grid]:
    """Fit a grid to every group and round to it: packed codes, and the grid as `affine.fit` gives it."""
    grid = affine.fit(*value_range(x, axis, size), width, zero, scale_dtype, clip)
    return codes(x, grid["scale"], grid.get("zero"), width, axis, size), grid


def codes(x: Tensor, scale: Tensor, zero: Tensor | None, width: int, axis: str, size: int) -> Tensor:
    """Nearest codes of `x` [..., T, D] on grids shaped as `value_range`, `width` bits each.

    Returns:
        uint8 [..., T, ceil(D*width/8)], as `kvpack.ops.bits.pack` lays them out.
    """
    dim = affine.group_axis(axis)
    places = None if zero is None else zero.unsqueeze(dim)
    found = affine.codes(affine.split(x.float(), axis, size), scale.unsqueeze(dim), places, width)
    return bits.pack(affine.join(found, axis, x.shape[-1]), width)


def lost(x: Tensor, y: packed_affine.AffineCodes) -> tuple[float, float]:
    """`squares` of `x` [..., T, D] and what the codes `y` stand for."""
    return squares(x, packed_affine.dense(y, torch.float32))


def squares(x: Tensor, other: Tensor) -> tuple[float, float]:
    """Sums of the squares of ``x - other`` and of `x` [..., T, D]; `other` is float32.

    Within a row in float32 (float64 where `x` is), over rows in float64.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return _squares(exact - other), _squares(exact)


def _squares(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=-1).double().square().sum())
