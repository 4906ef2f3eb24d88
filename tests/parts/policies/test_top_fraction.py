"""Shares of important tokens."""

import pytest
import torch

from kvpack.core.errors import RecipeError
from kvpack.parts.policies.top_fraction import TopFraction
from kvpack.parts.scorers.accumulated_attention import AccumulatedAttention
from tests.contracts.discovery import random

SCORER = AccumulatedAttention()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.6, 0.7, 1.0])
@pytest.mark.parametrize("least", [0, 2])
def test_counts_are_the_share_and_neither_part_ever_shrinks(share: float, least: int) -> None:
    policy = TopFraction(SCORER, share=share, least_tokens=least)
    tokens = torch.arange(200)
    high = policy.important(tokens)
    exact = [(n * round(share * 10)) // 10 for n in range(200)]
    expected = [max(e, min(least, n)) if share else e for n, e in enumerate(exact)]
    assert high.tolist() == expected
    assert (high.diff() >= 0).all()
    assert ((tokens - high).diff() >= 0).all()
    assert policy.placement(150, 4, "key") == (expected[150], 150 - expected[150])


def test_the_highest_scores_of_each_row_and_head() -> None:
    scores = random(2, 3, 20)
    everyone = torch.ones(2, 3, 20, dtype=torch.bool)
    chosen = TopFraction(SCORER, share=0.3).choose(scores, everyone, everyone[:, 0])
    for row in range(2):
        for head in range(3):
            best = scores[row, head].topk(6).indices
            assert set(chosen[row, head].nonzero().flatten().tolist()) == set(best.tolist())


def test_newest_tokens_padding_and_candidates() -> None:
    policy = TopFraction(SCORER, share=0.4, recent_share=0.5)
    scores = torch.arange(20, 0, -1.0).expand(2, 1, 20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :10] = False
    candidates = torch.ones(2, 1, 20, dtype=torch.bool)
    candidates[0, 0, 1] = False
    chosen = policy.choose(scores, candidates, valid)
    assert chosen[0, 0].nonzero().flatten().tolist() == [0, 2, 3, 4, 16, 17, 18, 19]
    assert chosen[1, 0].nonzero().flatten().tolist() == [10, 11, 18, 19]


def test_leaving_keeps_the_newest_and_goes_by_intervals() -> None:
    policy = TopFraction(SCORER, recent_tokens=10, interval=6)
    assert [policy.leaving(n, 4, "key") for n in (10, 17, 18, 25, 26, 34)] == [0, 0, 8, 8, 16, 24]
    assert policy.coded == ("high", "low")


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"share": -0.1}, {"recent_share": 2.0}])
def test_shares_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        TopFraction(SCORER, **wrong)
