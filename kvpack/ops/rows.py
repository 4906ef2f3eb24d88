"""Token rows that do not count."""

from __future__ import annotations

from torch import Tensor


def mask(valid: Tensor, x: Tensor) -> Tensor:
    """`valid` [B, T] shaped to broadcast against `x` [B, ..., T, D]."""
    batch, tokens = valid.shape
    return valid.reshape(batch, *(1,) * (x.dim() - 3), tokens, 1)


def per_channel(numbers: Tensor, x: Tensor) -> Tensor:
    """`numbers` [K, D] shaped to broadcast against `x` [..., K, T, D], or [1, D] against [T, D]."""
    return numbers.unsqueeze(-2) if x.dim() > 2 else numbers
