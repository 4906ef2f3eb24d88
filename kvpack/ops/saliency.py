"""Column sums of attention over chosen query rows, which may differ between the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpack.ops.attention_scores import column_sums


def sums_of_rows(
    query: Tensor, key: Tensor, visible: Tensor | None, scaling: float, rows: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`kvpack.ops.attention_scores.column_sums` with other query rows for each row of the batch.

    Args:
        query: [B, H, T, D].
        key: [B, K, S, D].
        visible: bool [B or 1, 1 or H, T, S]; None for causal attention.
        scaling: factor of the scores.
        rows: indices of query rows, one tensor for all of the batch or one for each of its rows.

    Returns:
        Sums float32 [B, K, S] and how many of the rows see each key, int32 [B, 1, S].
    """
    if len(rows) == 1:
        found = [column_sums(query, key, visible, scaling, rows[0])]
    else:
        found = [
            column_sums(query[b : b + 1], key[b : b + 1], _of_row(visible, b), scaling, part)
            for b, part in enumerate(rows)
        ]
    sums, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
    return sums.float(), counts.to(torch.int32).unsqueeze(1)


def counts_of_rows(query: Tensor, key: Tensor, visible: Tensor | None, rows: Sequence[Tensor]) -> Tensor:
    """How many of the query rows see each key, int32 [B, 1, S]; arguments as of `sums_of_rows`."""
    (batch, _, tokens, _), keys = query.shape, key.shape[2]
    counts = torch.zeros((batch, keys), dtype=torch.int32, device=query.device)
    for b in range(batch):
        part = rows[b if len(rows) > 1 else 0]
        if visible is None:
            ends = torch.zeros(keys, dtype=torch.int32, device=query.device)
            ends.index_add_(0, part + (keys - tokens), torch.ones_like(part, dtype=torch.int32))
            counts[b] = ends.flip(0).cumsum(0).flip(0)
            continue
        seen = visible[b if visible.shape[0] > 1 else 0, 0]
        for block in torch.split(part, 128):
            counts[b] += seen.index_select(0, block).sum(0, dtype=torch.int32)
    return counts.unsqueeze(1)


def real_rows(valid: Tensor | None, tokens: int, device: torch.device) -> list[Tensor]:
    """Indices of the tokens that are not padding: one tensor for all rows of the batch, or one for each."""
    if valid is None or bool(valid.all()):
        return [torch.arange(tokens, device=device)]
    return [row.nonzero().squeeze(-1) for row in valid]


def _of_row(visible: Tensor | None, row: int) -> Tensor | None:
    return visible[row : row + 1] if visible is not None and visible.shape[0] > 1 else visible
