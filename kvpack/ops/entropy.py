"""How few bytes integer codes can become, judged by their histogram."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(codes: Tensor) -> float:
    """Bits per code that no coder of single codes can beat; 0 for no codes.

    Args:
        codes: uint8, any shape.
    """
    counts = torch.bincount(codes.flatten().int(), minlength=256).double()
    shares = counts[counts > 0] / max(1, codes.numel())
    return float(-(shares * shares.log2()).sum()) + 0.0


def one_step(scale: Tensor, factor: float = 1.0) -> Tensor:
    """The widest of all steps, times `factor`, for every row: codes of one scale have few values.

    Args:
        scale: of symmetric grids, one per row or group.
        factor: widens the step.

    Returns:
        Shape and dtype of `scale`.
    """
    return (scale.float().amax() * factor).to(scale.dtype).expand(scale.shape).contiguous()
