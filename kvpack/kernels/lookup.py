"""Products with codes that are looked up in levels or codebooks, some of them with zeros between."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.core.types import CodedRows
from kvpack.kernels import choice
from kvpack.ops import packed_affine, packed_lookup


def scores(query: Tensor, x: CodedRows) -> Tensor:
    """Products of queries [..., M, D] with the numbers [..., T, D]: float32 [..., M, T]."""
    if _cpu(query, x):
        from kvpack.kernels.cpu import lookup

        return lookup.scores(query, x)
    return query.float() @ _decoded(x).mT


def mix(weights: Tensor, x: CodedRows) -> Tensor:
    """Sums of the numbers [..., T, D] with weights [..., M, T]: float32 [..., M, D]."""
    if _cpu(weights, x):
        from kvpack.kernels.cpu import lookup

        return lookup.mix(weights, x)
    return weights.float() @ _decoded(x)


def dense(x: CodedRows, dtype: torch.dtype) -> Tensor:
    """The decoded numbers [..., T, D] in `dtype`."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16) and _cpu(x.codes, x):
        from kvpack.kernels.cpu import lookup

        return lookup.dense(x, dtype)
    return _decoded(x).to(dtype)


def _decoded(x: CodedRows) -> Tensor:
    """The reference: float32 [..., T, D]."""
    if x.kind == "even":
        codes = packed_affine.AffineCodes(x.codes, x.first, x.second, x.bits, "channel", x.group, x.width)
        values = packed_affine.dense(codes, torch.float32)
    elif x.second is None:
        raise ValueError(f"{x.kind} rows are incomplete")
    elif x.kind == "mirrored":
        values = packed_lookup.levels(x.codes, x.first, x.second, x.group, x.width)
    else:
        values = packed_lookup.vectors(x.codes, x.first, x.second, x.bits, x.group, x.width)
    return values if x.mask is None else packed_lookup.opened(values, x.mask, x.keep, x.of, x.channels)


def _cpu(source: Tensor, x: CodedRows) -> bool:
    if not choice.on_cpu(source, x.codes, x.first, x.second, x.mask):
        return False
    from kvpack.kernels.cpu import lookup

    return lookup.fits(x)
