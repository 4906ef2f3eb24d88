"""Integers on integers: 8-bit codes with one step per row, then fewer bits per group of those codes.

With b bits, L = 2^b - 1 and a row's step s0, numbers x become y = x/s0 within [-P, P], and a group of
them q = round((y - z)/s1) with integers z and s1, so that y_hat = q*s1 + z is an integer. It shall fit
a signed byte, so that products can stay integers. The *protective range* is

    P = floor(127 * L / (L + 1)):    119 for 4 bits.

A group spans at most 2P, so s1 <= ceil(2P/L); a value lies at most s1/2 above the largest number of its
group, and P + s1/2 <= 127. Source: QServe, arXiv 2405.04532, section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.ops import affine

Grid = dict[str, Tensor]


def protective_range(bits: int) -> int:
    """The largest 8-bit code, P."""
    levels = 1 << bits
    return 127 * (levels - 1) // levels


def row_step(x: Tensor, bits: int) -> Tensor:
    """s0 float16 [..., T, 1] of rows [..., T, D], rounded up; 1 for rows of zeros."""
    step = x.abs().nan_to_num(0.0).amax(-1, keepdim=True) / protective_range(bits)
    return affine.round_towards(torch.where(step == 0, 1.0, step), torch.float16, up=True)


def bytes_of(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """y: `x` in steps of its row, within the protective range, float32."""
    limit = protective_range(bits)
    return (x.float() / step.float()).nan_to_num(0.0).clamp(-limit, limit)


def fit(y: Tensor, bits: int, size: int) -> Grid:
    """Integer grids of groups of `size` 8-bit codes [..., T, D]: "step" uint8, "low" int8.

    A group's range asks for a step between two integers; it gets the one with the smaller squared
    error. The paper's rounding to the nearer one costs 15 % more error on real weights of 4 bits.
    """
    low, high = affine.value_range(affine.split(y.round(), "channel", size), -1)
    even = (high - low) / (2**bits - 1)
    finer, coarser = (_grid(step, low) for step in (even.floor(), even.ceil()))
    better = _error(y, finer, bits, size) < _error(y, coarser, bits, size)
    return {name: torch.where(better, finer[name], coarser[name]) for name in finer}


def _grid(step: Tensor, low: Tensor) -> Grid:
    return {"step": step.clamp(min=1).to(torch.uint8), "low": low.to(torch.int8)}


def _error(y: Tensor, grid: Grid, bits: int, size: int) -> Tensor:
    """Squared error of each group, a number that fills up the last one counted as often as it does."""
    error = value(snap(y, grid, bits, size), grid, size) - y
    return affine.split(error, "channel", size).square().sum(-1)


def snap(y: Tensor, grid: Grid, bits: int, size: int) -> Tensor:
    """Nearest codes of `y` on its grid, uint8."""
    split = affine.split(y, "channel", size)
    low, step = (grid[n].float().unsqueeze(-1) for n in ("low", "step"))
    codes = ((split - low) / step).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return affine.join(codes, "channel", y.shape[-1])


def value(codes: Tensor, grid: Grid, size: int) -> Tensor:
    """The 8-bit codes that codes stand for, q*s1 + z, float32."""
    split = affine.split(codes, "channel", size).float()
    low, step = (grid[n].float().unsqueeze(-1) for n in ("low", "step"))
    return affine.join(split * step + low, "channel", codes.shape[-1])


def as_affine(grid: Grid, scale: Tensor) -> Grid:
    """The affine grid with the same numbers: "scale" ``s0*s1`` and "zero" ``s0*z``, float32.

    Exactly the same: s0 has 11 significant bits, s1 and q*s1 + z have 9 at most, so that no product and
    no sum of these needs more than the 24 of float32.

    Args:
        grid: "step" and "low" [..., T, G].
        scale: s0 [..., T, 1].
    """
    whole = scale.float()
    return {"scale": grid["step"] * whole, "zero": grid["low"] * whole}
