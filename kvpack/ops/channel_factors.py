"""Factors per channel that move range between a tensor and the weights that read it.

x W^T = (x / s) (W diag(s))^T for any s > 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def peaks(stats: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Largest magnitude of every channel in the tensor and in the weights that read it.

    Args:
        stats: "channel_range" ("low", "high" [K, D]) and "consumers.weight" ("weight" [K, N, D]).

    Returns:
        Both float64 [K, D].

    Raises:
        ValueError: one of them is not finite.
    """
    found = stats["channel_range"]
    peak = magnitude(found["low"], found["high"]).double()
    weight = stats["consumers.weight"]["weight"].abs().amax(-2).double()
    if not bool(peak.isfinite().all() and weight.isfinite().all()):
        raise ValueError("the channel ranges are not finite")
    return peak, weight


def magnitude(low: Tensor, high: Tensor) -> Tensor:
    """Largest magnitude of what lies between `low` and `high`."""
    return torch.maximum(low.abs(), high.abs())


def balanced(peak: Tensor, weight: Tensor, alpha: float, beta: float, limit: float) -> Tensor:
    """``peak^alpha / weight^beta``, normalised, float32 [K, D].

    Args:
        peak: of the tensor [K, D].
        weight: of its readers [K, D].
        alpha: share of the tensor's range that moves to the weights.
        beta: share of the weights' range that moves to the tensor.
        limit: bound on a factor and on its inverse, relative to the geometric mean.

    Channels where one of both is 0 get 1.
    """
    live = (peak > 0) & (weight > 0)
    raw = torch.where(live, peak, 1.0) ** alpha / torch.where(live, weight, 1.0) ** beta
    return normalised(raw, live, limit)


def normalised(raw: Tensor, live: Tensor, limit: float) -> Tensor:
    """Factors over their geometric mean within [1/limit, limit], float32; 1 where not `live`."""
    if not bool(live.any()):
        return torch.ones_like(raw, dtype=torch.float32)
    mean = raw[live].log().mean().exp()
    factor = (raw / mean).clamp(1 / limit, limit)
    return torch.where(live, factor, 1.0).float()


def relative_magnitude(weight: Tensor, group: int) -> Tensor:
    """Mean over rows of |w| relative to the largest |w| of its row's group, float64 [K, D].

    Args:
        weight: [K, N, D].
        group: neighbouring channels that are compared; 0 for all. A last group may be smaller.
    """
    size = group or weight.shape[-1]
    pieces = []
    for start in range(0, weight.shape[-1], size):
        piece = weight[..., start : start + size].abs().double()
        top = piece.amax(-1, keepdim=True)
        pieces.append((piece / torch.where(top > 0, top, 1.0)).mean(-2))
    return torch.cat(pieces, -1)


def centred(raw: Tensor, live: Tensor) -> Tensor:
    """Factors over the geometric mean of the largest and the least, float32; 1 where not `live`."""
    if not bool(live.any()):
        return torch.ones_like(raw, dtype=torch.float32)
    raw = raw.clamp(min=1e-4)
    middle = (raw[live].amax() * raw[live].amin()).sqrt()
    return torch.where(live, raw / middle, 1.0).float()


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """Sum over tokens and rows of (w x)^2.

    Args:
        weight: float32 [K, N, D].
        gram: sum of x x^T per head [K, D, D].
    """
    return max(0.0, float(((weight @ gram) * weight).sum(dtype=torch.float64)))
