"""What a linear layer gives, from statistics of its input alone: energies, means, variances.

With y = W x over n tokens, sums of y and of y^2 follow exactly from the sum of x and from the Gram
matrix G = sum x x^T, so that any number of candidate weights can be judged without another pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIPE = 256
"""Columns of the Gram matrix that are read together; what is left of its diagonal blocks counts twice."""


def energies(weight: Tensor, gram: Tensor) -> Tensor:
    """Sum over tokens of y_r^2 for every output r, float64 [R]; reads half of the matrix.

    Args:
        weight: float32 [R, C].
        gram: sum of x x^T [C, C], symmetric.
    """
    weight = weight.to(gram.dtype)
    total = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for start in range(0, gram.shape[0], STRIPE):
        here, stripe = weight[:, start : start + STRIPE], gram[:, start : start + STRIPE]
        seen = here @ stripe[start : start + STRIPE]
        seen.addmm_(weight[:, :start], stripe[:start], alpha=2)
        total += seen.mul_(here).sum(-1, dtype=torch.float64)
    return total.clamp_(min=0)


def moments(weight: Tensor, gram: Tensor, total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every output over tokens, float64 [R] each.

    Args:
        weight: float32 [R, C].
        gram: sum of x x^T [C, C].
        total: sum of x [C].
        count: tokens n. The variance divides by n.
    """
    mean = total.double() / count
    # Centred first: the difference of two large numbers would lose the variance.
    centred = gram.double() / count - torch.outer(mean, mean)
    return weight.double() @ mean, energies(weight, centred)


def refit(weight: Tensor, rounded: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
    """Steps with which every row's outputs fit best: scale * <W x, Q x> / <Q x, Q x>.

    Args:
        weight: W, float32 [R, C].
        rounded: Q, float32 [R, C].
        gram: sum of x x^T [C, C].
        scale: of Q [R, groups].

    Returns:
        Shape and dtype of `scale`; rows that are all zero keep theirs.
    """
    seen = rounded @ gram
    own = (seen * rounded).sum(-1, dtype=torch.float64)
    fit = torch.where(own > 0, (seen * weight).sum(-1, dtype=torch.float64) / own, 1.0)
    return (scale.double() * fit.unsqueeze(-1)).to(scale.dtype)
