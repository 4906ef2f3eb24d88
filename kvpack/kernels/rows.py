"""Products with encoded tokens that are brought back to the model's basis, a few rows at a time.

`dense` is the reference; the compiled twins of `scores` and `mix` never hold all decoded tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.core.rows import LevelCodes, Place, Spread, Step, TokenRows, Turn
from kvpack.core.types import Rope
from kvpack.kernels import choice
from kvpack.ops import bits, hadamard, packed_affine


def scores(query: Tensor, x: TokenRows) -> Tensor:
    """Products of queries [B, K, M, D] with the tokens: float32 [B, K, M, T]."""
    if _cpu(query, x):
        from kvpack.kernels.cpu import rows

        return rows.scores(query, x)
    return query.float() @ dense(x).mT


def mix(weights: Tensor, x: TokenRows) -> Tensor:
    """Sums of the tokens with weights [B, K, M, T]: float32 [B, K, M, D]."""
    if _cpu(weights, x):
        from kvpack.kernels.cpu import rows

        return rows.mix(weights, x)
    return weights.float() @ dense(x)


def dense(x: TokenRows) -> Tensor:
    """The tokens in the model's basis, float32 [B, K, T, D]."""
    rows = _decoded(x)
    if x.outliers is not None:
        rows = rows.scatter(-1, x.outliers.places.long(), x.outliers.numbers.float())
    for step in x.steps:
        rows = _done(step, rows)
    return torch.unflatten(rows, -1, (x.heads, -1)).transpose(2, 3).flatten(1, 2) if x.heads > 1 else rows


def turn(rope: Rope, positions: Tensor, channels: int) -> Turn:
    """What ``rope.apply`` does to heads [.., T, D] at `positions` [B or 1, T].

    RoPE maps a pair of channels linearly, so that what it makes of two vectors tells all factors: one
    marks the first channel of every pair (and those that are not turned), the other the second.
    """
    partner = rope.partners(channels).to(positions.device)
    first = torch.arange(channels, device=positions.device) <= partner
    marks = torch.stack((first, ~first)).float()
    shape = (*positions.shape, channels)
    x = marks[None, :, None].expand(shape[0], 2, *shape[1:])
    of_first, of_second = rope.apply(x, positions).unbind(1)
    own, other = torch.where(first, of_first, of_second), torch.where(first, of_second, of_first)
    other = other.masked_fill(partner == torch.arange(channels, device=positions.device), 0.0)
    return Turn(own.contiguous(), other.contiguous(), partner)


def _cpu(given: Tensor, x: TokenRows) -> bool:
    if not choice.on_cpu(given):
        return False
    from kvpack.kernels.cpu import rows

    return rows.fits(x)


def _decoded(x: TokenRows) -> Tensor:
    source = x.source
    if isinstance(source, Tensor):
        return source.float()
    if isinstance(source, LevelCodes):
        codes = bits.unpack(source.codes, source.bits, source.channels)
        return source.levels[codes.int()].mul_(source.scale.float()).add_(source.centre.float())
    return packed_affine.dense(source, torch.float32)


def _done(step: Step, rows: Tensor) -> Tensor:
    if isinstance(step, Place):
        return rows.index_select(-1, step.order)
    if isinstance(step, Spread):
        apart = torch.unflatten(rows, -1, (-1, step.length))
        return hadamard.transform(apart, inverse=True).flatten(-2)
    apart = torch.unflatten(rows, -1, (-1, len(step.partner)))
    own, other = (t[:, None, :, None] for t in (step.own, step.other))
    return (own * apart + other * apart.index_select(-1, step.partner)).flatten(-2)
