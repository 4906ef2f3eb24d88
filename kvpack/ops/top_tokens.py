"""Choosing the best tokens of each query among those that it sees."""

from __future__ import annotations

import torch
from torch import Tensor


def between(visible: Tensor, first: int, newest: int) -> Tensor:
    """Those of the visible tokens [..., T, S] that are neither among the first nor the newest ones.

    Ages count visible tokens only, so that padding and holes in the row play no part.
    """
    order = visible.cumsum(-1)
    return visible & (order > first) & (order <= order[..., -1:] - newest)


def share(tokens: Tensor, fraction: float, minimum: int) -> Tensor:
    """max(minimum, floor(fraction * tokens)), int64."""
    return (fraction * tokens.double()).floor().long().clamp(min=minimum)


def best(scores: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts` highest scores of every row.

    Args:
        scores: [B, H, T, S]; NaN counts as the lowest.
        among: tokens that may be chosen, bool, broadcast to `scores`.
        counts: how many per row, [B or 1, 1, T, 1]; more than there are choose all.

    Returns:
        bool [B, H, T, S].
    """
    among = among.expand_as(scores)
    most = min(int(counts.max()), scores.shape[-1]) if counts.numel() else 0
    found = scores.nan_to_num(-torch.inf).masked_fill(~among, -torch.inf).topk(most, -1).indices
    wanted = torch.arange(most, device=scores.device) < counts
    return torch.zeros_like(among).scatter_(-1, found, wanted.expand_as(found)) & among
