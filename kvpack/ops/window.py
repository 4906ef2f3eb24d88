"""Windows of exact tokens: how many leave them, and which come first. Counting needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def leaving(tail_tokens: int, block: int, recent_tokens: int) -> int:
    """Tokens of an exact tail that are encoded now.

    Tokens that stand alone (`block` 1) leave one by one, and the newest `recent_tokens` stay.
    Tokens that are encoded in blocks leave when the window is full, all at once: the window holds
    F = `recent_tokens` rounded up to whole blocks (at least one) and is empty after each flush.
    Source: KIVI, arXiv 2402.02750, algorithm 1.
    """
    if block == 1:
        return max(0, tail_tokens - recent_tokens)
    full = max(1, -(-recent_tokens // block)) * block
    return tail_tokens // full * full


def first_tokens(seen: Tensor, valid: Tensor | None, tokens: int, first: int) -> Tensor | None:
    """Which tokens of an update are among the `first` tokens of their row, bool [B, T]; None if none.

    Args:
        seen: tokens of each row before the update, padding not counted [B].
        valid: tokens that are not padding [B, T]; None when all are.
        tokens: T.
        first: how many tokens of a row count as its first.
    """
    if first == 0:
        return None
    if valid is None:
        valid = seen.new_ones((len(seen), tokens)).bool()
    order = seen.reshape(-1, 1) + valid.long().cumsum(-1)
    found = valid & (order <= first)
    return found if bool(found.any()) else None
