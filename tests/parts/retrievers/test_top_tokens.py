"""Top tokens against a slow choice, one query at a time."""

import pytest
import torch

from kvpack.parts.retrievers.top_tokens import TopTokens
from tests.contracts.discovery import random


def slow(part: TopTokens, scores: list[float], visible: list[bool]) -> set[int]:
    seen = [i for i, v in enumerate(visible) if v]
    always = set(seen[: part.sink_tokens]) | set(seen[len(seen) - part.recent_tokens :])
    if len(seen) <= part.recent_tokens:
        always = set(seen)
    k = max(part.minimum, int(part.fraction * len(seen)))
    others = sorted((i for i in seen if i not in always), key=lambda i: -scores[i])
    return always | set(others[:k])


@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.05, 0.29, 1.0])
@pytest.mark.parametrize("tokens", [1, 30, 100, 311])
def test_equals_the_slow_choice(fraction: float, tokens: int) -> None:
    part = TopTokens(fraction=fraction, minimum=1, sink_tokens=4, recent_tokens=16)
    scores = random(2, 3, 2, tokens)
    visible = random(2, 1, 2, tokens, seed=3) > -1
    read = part.select(scores, visible)
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
        expected = slow(part, scores[b, h, t].tolist(), visible[b, 0, t].tolist())
        assert set(read[b, h, t].nonzero().squeeze(-1).tolist()) == expected


def test_counts_follow_the_paper() -> None:
    part = TopTokens()
    assert (part.fraction, part.sink_tokens, part.recent_tokens) == (0.03, 8, 64)
    assert part.most(10_000) == 8 + 64 + 300
    assert part.most(20) == 20
    assert part.most(80) == 8 + 64 + 2
    read = part.select(random(1, 4, 1, 10_000), torch.ones(1, 1, 1, 10_000, dtype=torch.bool))
    assert (read.sum(-1) == part.most(10_000)).all()
