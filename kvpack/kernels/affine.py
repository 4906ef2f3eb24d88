"""Products with affine codes that are never decoded as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.kernels import choice
from kvpack.ops import packed_affine
from kvpack.ops.packed_affine import AffineCodes


def scores(query: Tensor, x: AffineCodes) -> Tensor:
    """See `kvpack.ops.packed_affine.scores`."""
    if _cpu(query, x):
        from kvpack.kernels.cpu import affine

        return affine.scores(query, x)
    return packed_affine.scores(query, x)


def mix(weights: Tensor, x: AffineCodes) -> Tensor:
    """See `kvpack.ops.packed_affine.mix`."""
    if _cpu(weights, x):
        from kvpack.kernels.cpu import affine

        return affine.mix(weights, x)
    return packed_affine.mix(weights, x)


def dense(x: AffineCodes, dtype: torch.dtype) -> Tensor:
    """See `kvpack.ops.packed_affine.dense`."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16) and _cpu(x.codes, x):
        from kvpack.kernels.cpu import affine

        return affine.dense(x, dtype)
    return packed_affine.dense(x, dtype)


def _cpu(source: Tensor, x: AffineCodes) -> bool:
    if not choice.on_cpu(source, x.codes, x.scale, x.zero):
        return False
    from kvpack.kernels.cpu import affine

    return affine.fits(x)
