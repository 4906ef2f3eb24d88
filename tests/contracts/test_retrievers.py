"""What every retriever promises."""

import pytest
import torch
from torch import Tensor

from kvpack.core.roles import Retriever
from tests.contracts.discovery import parts, random

RETRIEVERS = parts("retrievers")
LENGTHS = [1, 7, 90, 200]


def causal(queries: int, tokens: int, padding: tuple[int, ...] = (0,)) -> Tensor:
    """Visible tokens [B, 1, T, S] of the newest queries; each row begins with its padding."""
    slots = torch.arange(tokens)
    last = torch.arange(tokens - queries, tokens)[:, None]
    return torch.stack([(slots <= last) & (slots >= pad) for pad in padding])[:, None]


@pytest.mark.parametrize("retriever", RETRIEVERS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_only_visible_tokens_are_read_and_always_those_that_must(retriever: Retriever, tokens: int) -> None:
    queries = min(5, tokens)
    visible = causal(queries, tokens, (0, tokens // 2))
    read = retriever.select(random(2, 4, queries, tokens), visible)
    assert read.shape == (2, 4, queries, tokens)
    assert read.dtype == torch.bool
    assert not (read & ~visible).any()
    always = retriever.always(visible)
    assert not (always & ~visible).any()
    assert (read | ~always).all()


@pytest.mark.parametrize("retriever", RETRIEVERS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_query_reads_itself_and_at_most_what_is_announced(retriever: Retriever, tokens: int) -> None:
    visible = causal(min(5, tokens), tokens)
    read = retriever.select(random(1, 4, *visible.shape[2:]), visible)
    assert read[
        ..., torch.arange(visible.shape[2]), tokens - visible.shape[2] + torch.arange(visible.shape[2])
    ].all()
    for row, seen in zip(read.sum(-1).transpose(1, 2)[0], visible.sum(-1)[0, 0], strict=True):
        assert (row <= retriever.most(int(seen))).all()
        assert retriever.most(int(seen)) <= int(seen)


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_a_query_chooses_alone(retriever: Retriever) -> None:
    """Rows, heads, queries and padding before them play no part."""
    scores, visible = random(2, 3, 4, 120), causal(4, 120, (0, 30))
    read = retriever.select(scores, visible)
    for b, start in ((0, 0), (1, 30)):
        for t in range(4):
            alone = retriever.select(
                scores[b : b + 1, 1:2, t : t + 1, start:], visible[b : b + 1, :, t : t + 1, start:]
            )
            assert torch.equal(alone[0, 0, 0], read[b, 1, t, start:])


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_the_best_token_in_the_middle_is_found_where_there_is_a_choice(retriever: Retriever) -> None:
    scores, visible = random(1, 2, 1, 200), causal(1, 200)
    scores[..., 100] = 50.0
    assert retriever.select(scores, visible)[..., 100].all() == (
        retriever.most(200) > retriever.always(visible).sum()
    )


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_bad_scores_and_hidden_rows_do_not_break_it(retriever: Retriever) -> None:
    scores, visible = random(1, 2, 3, 100), causal(3, 100)
    scores[..., 40:50] = torch.nan
    visible[:, :, 1] = False
    read = retriever.select(scores, visible)
    assert not read[:, :, 1].any()
    assert not (read & ~visible).any()
