"""Products that read only the rows of a matrix that count, for one token at a time; no gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PIECE_BYTES = 1 << 21
"""Rows are gathered in pieces that stay in the processor's cache until they are multiplied."""


def chosen_rows(weight: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """``weight[rows] @ x`` without reading the other rows, [n].

    Args:
        weight: [R, C], its rows contiguous.
        rows: numbers of rows, int64 [n].
        x: [C].
    """
    weight, x = weight.detach(), x.detach()
    count, channels = len(rows), weight.shape[1]
    piece = max(1, PIECE_BYTES // (channels * weight.element_size()))
    held = weight.new_empty(min(piece, count), channels)
    result = weight.new_empty(count)
    for start in range(0, count, piece):
        stop = min(start + piece, count)
        gathered = torch.index_select(weight, 0, rows[start:stop], out=held[: stop - start])
        torch.mv(gathered, x, out=result[start:stop])
    return result


def weighted_rows(weight: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
    """``factors @ weight[rows]`` without reading the other rows, [C].

    Each thread adds up a share of the rows; nothing is copied.

    Args:
        weight: [R, C], its rows contiguous.
        rows: numbers of rows, int64 [n].
        factors: one per row [n], in the dtype of `weight`.
    """
    count = len(rows)
    if not count:
        return weight.new_zeros(weight.shape[1])
    share = -(-count // min(torch.get_num_threads(), count))
    starts = torch.arange(0, count, share, device=rows.device)
    sums = functional.embedding_bag(rows, weight.detach(), starts, mode="sum", per_sample_weights=factors)
    return sums[0] if len(sums) == 1 else sums.sum(0)
