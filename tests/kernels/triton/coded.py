"""Random numbers as the affine codec stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.core.types import Group
from kvpack.ops.packed_affine import AffineCodes, dense
from kvpack.parts.codecs.affine import Affine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = (("float", "float16"), ("integer", "bfloat16"), ("none", "float32"), ("float", "float8_e4m3fn"))


def coded(x: Tensor, bits: int, group: Group, zero: str = "float", scale: str = "float16") -> AffineCodes:
    codec = Affine(bits=bits, group=group, zero=zero, scale_dtype=scale)
    tensors = {name: t.to(DEVICE) for name, t in codec.encode(x, {}).tensors.items()}
    return AffineCodes(
        tensors["codes"], tensors["scale"], tensors.get("zero"), bits, group.axis, group.size, x.shape[-1]
    )


def numbers(x: AffineCodes) -> Tensor:
    return dense(x, torch.float32).double()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Within 1e-5 (float32) or 1e-3 of the largest number, and the rounding of a bfloat16 result.

    The interpreter rounds to bfloat16 by cutting off: by a whole unit, 2^-7.
    """
    bound = (1e-5 if dtype == torch.float32 else 1e-3) * expected.abs().max()
    if got.dtype == torch.bfloat16:
        bound = bound + expected.abs() * 2**-7
    return bool(((got.double() - expected).abs() <= bound).all())
