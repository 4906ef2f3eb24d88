"""How much attention each key receives, in blocks of query rows: no T x T matrix is ever held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def column_sums(
    query: Tensor,
    key: Tensor,
    visible: Tensor | None,
    scaling: float,
    rows: Tensor | None = None,
    block: int = 128,
    *,
    per_head: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the attention probabilities of each key over queries, and count who can see it.

    sums_k = sum over rows i of A_{i,k}, with A = softmax(scaling * q k^T) over the visible keys.
    Memory is [B, H, block, S] for one block of rows. Sources: the metric of 2410.10781, section 3;
    the saliency of ZipCache, 2405.14256, equations 7 and 8.

    Args:
        query: [B, H, T, D], as attention is given it (after RoPE).
        key: [B, K, S, D] with H a multiple of K.
        visible: which keys a query attends to, bool [B or 1, 1 or H, T, S]; None for causal
            attention in which the queries are the last T of S tokens.
        scaling: factor of the scores.
        rows: indices [N] of the query rows to look at; None for all.
        block: query rows at once.
        per_head: one sum per query head instead of their sum over each kv head.
        softcap: c of models that pass scores through c * tanh(score / c).
        sink_logits: learned logits [H] that take part in the softmax beside the keys (gpt-oss).

    Returns:
        Sums float64 [B, K, S] ([B, H, S] with `per_head`), and how many of the rows see each key,
        int64 [B, S]. Rows that see nothing (padding) add nothing. Heads are taken to see alike.
    """
    batch, heads, tokens, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    rows = torch.arange(tokens, device=query.device) if rows is None else rows
    sums = torch.zeros((batch, heads, keys), dtype=torch.float64, device=query.device)
    counts = torch.zeros((batch, keys), dtype=torch.int64, device=query.device)
    for part in torch.split(rows, block):
        seen = _rows_of(visible, part, tokens, keys)
        chosen = query.index_select(2, part)
        found = probabilities(chosen, key, seen, scaling, softcap=softcap, sink_logits=sink_logits)
        sums += found.sum(2, dtype=torch.float64)
        counts += seen[:, 0].sum(1)
    return (sums if per_head else sums.reshape(batch, kv_heads, -1, keys).sum(2)), counts


def probabilities(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    scaling: float,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention probabilities [B, H, T, S] of a few query rows, float32 or wider.

    Arguments as of `column_sums`. Rows that see nothing are zero; with `sink_logits` rows sum to
    less than one.
    """
    batch, kv_heads = key.shape[:2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, kv_heads, -1, *query.shape[2:])
    scores = torch.einsum("bkgtd,bksd->bkgts", grouped, key.to(wide)).flatten(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.to(wide).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
    return scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)


def _rows_of(visible: Tensor | None, rows: Tensor, tokens: int, keys: int) -> Tensor:
    """The rows `rows` of the mask, bool [B or 1, 1 or H, N, S]."""
    if visible is not None:
        return visible.index_select(2, rows.to(visible.device))
    last = rows + (keys - tokens)
    return (torch.arange(keys, device=rows.device) <= last[:, None])[None, None]
