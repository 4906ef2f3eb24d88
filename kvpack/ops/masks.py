"""Masks that keep N of every M neighbours: choosing them, numbering them, closing and opening the gaps.

A group of M has M!/(N!(M-N)!) patterns, numbered in lexicographic order of the places that are kept:
2 of 4 make 6, which take 3 bits where a pair of 2-bit places would take 4.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional


def index_bits(keep: int, of: int) -> int:
    """Bits of a pattern's number."""
    return (math.comb(of, keep) - 1).bit_length()


@cache
def patterns(keep: int, of: int) -> Tensor:
    """All patterns, bool [P, M]."""
    found = torch.zeros(math.comb(of, keep), of, dtype=torch.bool)
    for row, places in zip(found, combinations(range(of), keep), strict=True):
        row[list(places)] = True
    return found


def filled(x: Tensor, of: int, number: float = 0.0) -> Tensor:
    """`x` [..., D] with `number` behind it, up to a multiple of `of`."""
    return functional.pad(x, (0, -x.shape[-1] % of), value=number)


def largest(score: Tensor, keep: int, of: int) -> Tensor:
    """The `keep` largest of every `of` neighbours, bool as `score` [..., D']; the first ones among equals."""
    groups = torch.unflatten(score, -1, (score.shape[-1] // of, of))
    order = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (order < keep).flatten(-2)


def closed(x: Tensor, kept: Tensor) -> Tensor:
    """The kept numbers of `x` [..., D'] side by side; every row keeps as many."""
    return x[kept].reshape(*x.shape[:-1], -1)


def opened(values: Tensor, kept: Tensor) -> Tensor:
    """Invert `closed`: zeros where nothing was kept."""
    return values.new_zeros(kept.shape).masked_scatter(kept, values)


def numbers(kept: Tensor, keep: int, of: int) -> Tensor:
    """The number of every group's pattern, uint8 [..., D'/M]."""
    table = patterns(keep, of).to(kept.device)
    places = 2 ** torch.arange(of, device=kept.device)
    number = torch.zeros(2**of, dtype=torch.uint8, device=kept.device)
    number[(table * places).sum(-1)] = torch.arange(len(table), dtype=torch.uint8, device=kept.device)
    groups = torch.unflatten(kept, -1, (kept.shape[-1] // of, of))
    return number[(groups * places).sum(-1)]


def kept_by(numbers: Tensor, keep: int, of: int) -> Tensor:
    """Invert `numbers`: bool [..., D']; numbers beyond the last pattern stand for the last."""
    table = patterns(keep, of).to(numbers.device)
    return table[numbers.long().clamp(max=len(table) - 1)].flatten(-2)
