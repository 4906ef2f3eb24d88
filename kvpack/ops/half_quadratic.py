"""Half-quadratic splitting: move the zeros of grids so that most weights, not the largest, fit them.

Source: HQQ, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023). With
W the weights, W_r what their codes stand for and r = W - W_r, the problem

    min over zeros and E of  |E|^p + beta/2 |W - E - W_r|^2,    0 < p < 1

is solved in turns: E is the shrunk residual, then each zero is the mean over its group of what E
leaves unexplained, then codes are chosen anew. For a zero m that is added, x = q*s + m, the second
turn is m + mean(r - E).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Grid = dict[str, Tensor]


def group_means(x: Tensor, size: int) -> Tensor:
    """Means of `size` neighbours along the last axis, [R, C] -> [R, ceil(C/size)]; the last may be short."""
    channels = x.shape[-1]
    members = torch.full((-(-channels // size),), float(size), device=x.device)
    members[-1] = channels - size * (len(members) - 1)
    padded = functional.pad(x, (0, -channels % size))
    return torch.unflatten(padded, -1, (len(members), size)).sum(-1) / members


def shrink(residual: Tensor, beta: float, p: float) -> Tensor:
    """sign(r) * max(0, |r| - |r|^(p-1) / beta), the (approximate) proximal step of the l_p norm; 0 at 0."""
    size = residual.abs()
    return residual.sign() * (size - size.pow(p - 1) / beta).clamp(min=0).nan_to_num(0.0)


def centre(
    weight: Tensor,
    grid: Grid,
    size: int,
    snap: Callable[[Tensor, Grid], Tensor],
    value: Callable[[Tensor, Grid], Tensor],
    *,
    p: float,
    beta: float,
    growth: float,
    rounds: int,
    relative: bool = False,
) -> tuple[Tensor, Grid]:
    """Codes of `weight` on a grid whose zeros have been moved.

    Each group keeps the best zero that it met and stops as soon as its mean |r| stops falling: groups
    do not depend on each other. Zeros are rounded to their stored dtype before they are judged.

    Args:
        weight: float32 [R, C].
        grid: its grid: "scale" and a float "zero" [R, ceil(C/size)] that is added to codes times steps.
        size: channels that share a grid entry.
        snap: nearest codes uint8 [R, C] on a grid.
        value: numbers float32 [R, C] that codes stand for.
        p: norm of the residual.
        beta: first weight of the quadratic term.
        growth: factor of `beta` from round to round.
        rounds: most rounds.
        relative: measure residuals in steps when they are shrunk, not in units of the weights.

    Returns:
        Codes uint8 [R, C] and the grid, the steps of which are those that were given.
    """
    stored = grid["zero"].dtype
    limit = torch.finfo(stored).max
    unit = grid["scale"].float().repeat_interleave(size, -1)[:, : weight.shape[1]] if relative else 1.0
    residual = weight - value(snap(weight, grid), grid)
    least, best = group_means(residual.abs(), size), grid["zero"]
    going, zero = torch.ones_like(least, dtype=torch.bool), best
    for _ in range(rounds):
        sparse = shrink(residual / unit, beta, p) * unit
        moved = zero.float() + group_means(residual - sparse, size)
        zero = torch.where(going, moved.clamp(-limit, limit).to(stored), zero)
        trial = {**grid, "zero": zero}
        residual = weight - value(snap(weight, trial), trial)
        error = group_means(residual.abs(), size)
        going &= error < least
        least, best = torch.where(going, error, least), torch.where(going, zero, best)
        if not bool(going.any()):
            break
        beta *= growth
    grid = {**grid, "zero": best}
    return snap(weight, grid), grid
