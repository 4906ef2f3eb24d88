"""Massive activations are found wherever they are, except in padding."""

import pytest
import torch

from kvpack.core.errors import KvpackError
from kvpack.core.types import CacheView
from kvpack.parts.policies.sink_detect import SinkDetect
from tests.contracts.discovery import random

SEEN = torch.tensor([0, 0])


def found(policy: SinkDetect, hidden: torch.Tensor, valid: torch.Tensor | None = None) -> list[list[int]]:
    batch, tokens = hidden.shape[:2]
    mask = policy.protect(CacheView(0, batch, tokens, SEEN[:batch], valid, hidden))
    return [row.nonzero().flatten().tolist() for row in mask]


def test_rows_have_their_own_sinks() -> None:
    hidden = random(2, 30, 16)
    hidden[0, 0, :3] = 500
    hidden[0, 12, 5] = -400
    hidden[1, 7, :4] = -300
    assert found(SinkDetect(top_values=4), hidden) == [[0, 12], [7]]


def test_loud_padding_is_not_searched() -> None:
    hidden = random(1, 10, 16)
    hidden[0, :4] = 1000
    hidden[0, 6, 1] = 50
    valid = torch.arange(10)[None] >= 4
    assert found(SinkDetect(top_values=1), hidden, valid) == [[6]]


def test_twenty_largest_values() -> None:
    hidden = random(1, 200, 16)
    threshold = hidden.abs().flatten().topk(20).values[-1]
    expected = (hidden.abs() >= threshold).any(-1)[0].nonzero().flatten().tolist()
    assert found(SinkDetect(), hidden) == [expected]


def test_short_prompts_are_protected_whole() -> None:
    assert found(SinkDetect(), random(1, 2, 4)) == [[0, 1]]


def test_later_pieces_compete_with_the_largest_values_so_far() -> None:
    """A prompt in pieces protects few more tokens than in one piece, and still finds late sinks."""
    hidden = random(2, 60, 8)
    hidden[0, 3, :2] = 300
    hidden[0, 50, 1] = 200
    hidden[1, 20, 4:6] = 100
    policy, memory = SinkDetect(top_values=2), {}
    pieces = []
    for start in range(0, 60, 20):
        piece = hidden[:, start : start + 20]
        view = CacheView(0, 2, 20, SEEN + start, None, piece, memory)
        pieces.append(policy.protect(view))
    rows = [row.nonzero().flatten().tolist() for row in torch.cat(pieces, -1)]
    assert rows[0] == [3], "200 at token 50 is below the two values of 300"
    assert 20 in rows[1]
    assert len(rows[1]) <= 3
    assert sorted(memory["largest"][1].tolist()) == [100, 100]


def test_single_tokens_are_not_protected() -> None:
    assert SinkDetect().protect(CacheView(0, 1, 1, SEEN[:1], None, 1e6 * random(1, 1, 16))) is None


def test_missing_input_is_an_error_with_a_way_out() -> None:
    with pytest.raises(KvpackError, match="layer 3") as caught:
        SinkDetect().protect(CacheView(3, 1, 5, SEEN[:1]))
    assert "kvpack.load" in caught.value.hint
