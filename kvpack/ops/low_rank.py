"""Truncated factorisation of many small matrices by power iteration."""

from __future__ import annotations

import torch
from torch import Tensor


def factors(x: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Q and P with ``x ~ Q P^T``, the best fit among all matrices whose columns Q spans.

    Subspace iteration from a seeded normal start P [D, r], the same for every matrix: repeat
    ``Q = orth(x orth(P)), P = x^T Q``. Each step is made orthonormal, not only the last: in exact
    arithmetic the product is the same, and numbers of any size neither overflow nor vanish.
    Source: GEAR, arXiv 2403.05527, algorithm 2.

    Args:
        x: [..., T, D]; every matrix is factored alone.
        rank: r, at most min(T, D).
        iterations: how often, 1 or more.
        seed: of the start.

    Returns:
        Q float32 [..., T, r] with orthonormal columns, P float32 [..., D, r].
    """
    x = x.float()
    start = torch.randn(x.shape[-1], rank, generator=torch.Generator().manual_seed(seed))
    right = start.to(x.device).expand(*x.shape[:-2], -1, -1)
    left = x.new_empty(0)
    for _ in range(iterations):
        left = torch.linalg.qr(x @ torch.linalg.qr(right).Q).Q
        right = x.mT @ left
    return left, right
