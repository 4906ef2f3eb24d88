"""Affine codes of random numbers."""

from typing import Literal

import torch

from kvpack.core.types import Group
from kvpack.ops.packed_affine import AffineCodes
from kvpack.parts.codecs.affine import Affine


def coded(
    shape: tuple[int, ...],
    bits: int,
    axis: str,
    size: int,
    zero: Literal["float", "integer", "none"] = "float",
    scale_dtype: Literal["float16", "bfloat16", "float32", "float8_e4m3fn"] = "float16",
) -> AffineCodes:
    """Codes of normal numbers [..., T, D] with a mean of their own."""
    generator = torch.Generator().manual_seed(bits * 1000 + size)
    codec = Affine(bits=bits, group=Group(axis, size), zero=zero, scale_dtype=scale_dtype)
    held = codec.encode(torch.randn(shape, generator=generator) + 0.3, {}).tensors
    return AffineCodes(held["codes"], held["scale"], held.get("zero"), bits, axis, size, shape[-1])
