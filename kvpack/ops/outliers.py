"""Extreme entries of vectors: which, and what to put in their place.

Entries are chosen by rank, so that ties never make more of them than the nominal count
(`ops.outlier_counts`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def both_ends(x: Tensor, smallest: int, largest: int, dim: int, valid: Tensor | None = None) -> Tensor:
    """Places of the `smallest` and `largest` entries of `x` along `dim`.

    Args:
        x: float32, all finite.
        smallest: entries taken from below.
        largest: entries taken from above; both together at most the length of `dim`.
        dim: axis of the vectors.
        valid: entries that count, broadcast against `x`; the others are taken only where too few
            count.

    Returns:
        int64, `x` with `dim` shortened to `smallest + largest`; no place twice.
    """
    low = x if valid is None else x.masked_fill(~valid, -torch.inf)
    above = low.topk(largest, dim).indices
    high = x if valid is None else x.masked_fill(~valid, torch.finfo(x.dtype).max)
    # What is taken from above is never taken again, not even instead of what does not count.
    high = high.scatter(dim, above, torch.inf)
    below = high.topk(smallest, dim, largest=False).indices
    return torch.cat((below, above), dim)


def farthest(x: Tensor, lower: Tensor, upper: Tensor, count: int) -> Tensor:
    """Places [..., T, count] of the entries of `x` [..., T, C] that lie farthest out of their ranges.

    The distance is |x - z| / s, with z the middle and s half the width of [lower, upper]. An entry
    that leaves a range without width lies farther out than all others.
    """
    centre, half = (upper + lower) / 2, (upper - lower) / 2
    distance = ((x - centre).abs() / half).nan_to_num(0.0, torch.finfo(torch.float32).max)
    return distance.topk(count, -1).indices


def replaced(x: Tensor, places: Tensor, dim: int, fill: str, valid: Tensor | None = None) -> Tensor:
    """`x` with the entries at `places` replaced by the "median" or "mean" of the others along `dim`.

    Entries where `valid` is False do not count; 0 is put where nothing is left.
    """
    rest = x.scatter(dim, places, torch.nan)
    counted = rest if valid is None else rest.masked_fill(~valid, torch.nan)
    if fill == "median":
        middle = counted.nanmedian(dim, keepdim=True).values
    else:
        middle = counted.nanmean(dim, keepdim=True)
    middle = middle.nan_to_num(0.0)
    return torch.where(rest.isnan(), middle, x)


def central_range(x: Tensor, keep: float, dim: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of the central entries of `x` along `dim`, `dim` removed.

    floor((1 - keep)/2 * n) entries are left out on each side. Source: KVQuant, arXiv 2401.18079,
    section 3.4: the 0.5 and 99.5 percentiles for keep = 0.99.
    """
    count = x.shape[dim]
    out = min(int((1 - keep) / 2 * count + 1e-9), (count - 1) // 2)
    if out == 0:
        return x.amin(dim), x.amax(dim)
    ends = (x.topk(out + 1, dim, largest=largest, sorted=True).values for largest in (False, True))
    lower, upper = (e.select(dim, out) for e in ends)
    return lower, upper
