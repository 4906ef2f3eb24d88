"""How many tokens leave an exact window; shared by the policies that keep one."""

from __future__ import annotations


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
