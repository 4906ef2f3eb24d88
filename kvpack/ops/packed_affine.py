"""Products with affine codes as they are stored: bit streams beside their grids.

The reference decodes; `kvpack.kernels.affine` has twins that never hold decoded numbers in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpack.ops import affine, bits


class AffineCodes(NamedTuple):
    """Encoded numbers [..., T, D]: "codes" uint8 [..., T, ceil(D*b/8)] and their grid.

    `scale` and `zero` (None for a symmetric grid) are [..., T, ceil(D/size)] for groups along
    "channel", [..., T/size, D] along "token"; a `size` of 0 is the whole axis.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    axis: str
    size: int
    channels: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.codes.shape[-2]

    @property
    def outer(self) -> int:
        """The product of the axes before T."""
        return self.codes.shape[:-2].numel()

    @property
    def group(self) -> int:
        """Channels, or tokens, that share a step."""
        whole = self.channels if self.axis == "channel" else self.tokens
        return min(self.size, whole) if self.size and self.axis == "channel" else self.size or whole


def dense(x: AffineCodes, dtype: torch.dtype) -> Tensor:
    """The decoded numbers [..., T, D] in `dtype`."""
    codes = bits.unpack(x.codes, x.bits, x.channels)
    dim = affine.group_axis(x.axis)
    zero = None if x.zero is None else x.zero.unsqueeze(dim)
    values = affine.values(affine.split(codes, x.axis, x.size), x.scale.unsqueeze(dim), zero, x.bits)
    return affine.join(values, x.axis, x.channels).to(dtype)


def scores(query: Tensor, x: AffineCodes) -> Tensor:
    """Products of queries [..., M, D] with the numbers [..., T, D]: float32 [..., M, T]."""
    return query.float() @ dense(x, torch.float32).mT


def mix(weights: Tensor, x: AffineCodes) -> Tensor:
    """Sums of the numbers [..., T, D] with weights [..., M, T]: float32 [..., M, D]."""
    return weights.float() @ dense(x, torch.float32)
