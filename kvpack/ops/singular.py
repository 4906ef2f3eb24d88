"""Singular bases of projections."""

from __future__ import annotations

import torch
from torch import Tensor


def input_basis(weight: Tensor) -> Tensor:
    """The directions of its input that a projection sees, the most amplified first.

    With W^T = U S B^T and U [C, r], r = min(R, C), ``(x U) U^T`` and x have the same projection.
    Computed in float64. Each direction points to where its largest entry is positive, so that the
    basis does not depend on the library's choice of signs. Source: XQuant, arXiv 2508.10395.

    Args:
        weight: W [R, C] of ``y = x W^T``.

    Returns:
        U float32 [C, r], columns orthonormal.
    """
    basis: Tensor = torch.linalg.svd(weight.double(), full_matrices=False).Vh.mT
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return (basis * torch.where(largest < 0, -1.0, 1.0)).float()
