"""Saliency of tokens, against attention written out (ZipCache 2405.14256, MiKV 2402.18096)."""

import math

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import KvpackError
from kvpack.core.roles import Scorer
from kvpack.core.types import ScoreView
from kvpack.parts.scorers.accumulated_attention import AccumulatedAttention
from kvpack.parts.scorers.normalized_attention import NormalizedAttention
from tests.contracts.discovery import random


def view(
    tokens: int,
    keys: int,
    *,
    kv_heads: int = 2,
    heads: int = 4,
    channels: int = 8,
    batch: int = 2,
    seed: int = 0,
) -> ScoreView:
    query = 2 * random(batch, heads, tokens, channels, seed=seed)
    key = random(batch, kv_heads, keys, channels, seed=seed + 1)
    return ScoreView(3, None, query, key, None, channels**-0.5)


def visible(given: ScoreView) -> Tensor:
    tokens, keys = given.query.shape[2], given.key.shape[2]
    return torch.arange(keys) <= torch.arange(keys - tokens, keys)[:, None]


def written_out(given: ScoreView, allowed: Tensor, row: int, head: int) -> Tensor:
    """Probabilities float64 [G, T, S] of the query heads of one kv head."""
    groups = given.query.shape[1] // given.key.shape[1]
    query = given.query[row, head * groups : (head + 1) * groups].double()
    scores = query @ given.key[row, head].double().T * given.scaling
    return scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(4, 1, 8), (4, 2, 48), (3, 3, 80)])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 9), (20, 20), (150, 170)])
def test_sums_are_those_of_the_whole_matrix(
    normalise: bool, heads: int, kv_heads: int, channels: int, tokens: int, keys: int
) -> None:
    given = view(tokens, keys, kv_heads=kv_heads, heads=heads, channels=channels)
    scorer = AccumulatedAttention(normalise=normalise)
    found = scorer.score(scorer.observe(given))
    allowed = visible(given)
    for row in range(2):
        for head in range(kv_heads):
            expected = written_out(given, allowed, row, head).sum((0, 1))
            expected = expected / allowed.sum(0) if normalise else expected
            torch.testing.assert_close(found[row, head].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("denominator", ["probes", "all"])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (5, 9), (200, 200), (400, 420)])
def test_means_are_those_of_the_probe_rows(denominator: str, tokens: int, keys: int) -> None:
    given = view(tokens, keys)
    scorer = NormalizedAttention(denominator=denominator)
    found = scorer.score(scorer.observe(given))
    rows, allowed = scorer.probes(3, tokens), visible(given)
    for row in range(2):
        for head in range(2):
            sums = written_out(given, allowed, row, head)[:, rows].sum((0, 1))
            counts = allowed[rows if denominator == "probes" else slice(None)].sum(0)
            torch.testing.assert_close(
                found[row, head].double(), sums / counts.clamp(min=1), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("tokens", [1, 2, 19, 32, 33, 200, 2000])
def test_probes_are_the_newest_and_as_many_others(tokens: int) -> None:
    scorer = NormalizedAttention()
    rows = scorer.probes(0, tokens)
    least = min(tokens, max(16, math.ceil(0.05 * tokens)))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert set(range(tokens - least, tokens)) <= set(rows.tolist())
    assert len(rows) == min(tokens, 2 * max(16, math.ceil(0.05 * tokens)))
    assert torch.equal(rows, scorer.probes(0, tokens)), "the same every time"
    if tokens > 100:
        assert not torch.equal(rows, scorer.probes(1, tokens))
        assert not torch.equal(rows, NormalizedAttention(seed=1).probes(0, tokens))
    if tokens <= 32:
        assert len(rows) == tokens


def test_uniform_attention_is_equal_by_means_and_falls_by_sums() -> None:
    """Card, check 2: of uniform causal attention, the sums favour the old."""
    tokens = 64
    query, key = torch.zeros(1, 1, tokens, 8), torch.zeros(1, 1, tokens, 8)
    given = ScoreView(0, None, query, key)
    sums = AccumulatedAttention().score(AccumulatedAttention().observe(given))[0, 0]
    assert (sums.diff() < 0).all()
    scorer = AccumulatedAttention(normalise=True)
    means = scorer.score(scorer.observe(given))[0, 0]
    rows = torch.arange(1, tokens + 1, dtype=torch.float64)
    expected = torch.stack([(1 / rows[j:]).mean() for j in range(tokens)])
    torch.testing.assert_close(means.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_tenth_of_the_rows_finds_most_of_the_important_tokens() -> None:
    """Card, check 5: overlap of the top 60 % with those of all rows."""
    torch.manual_seed(0)
    given = view(600, 600, channels=16, batch=1)
    popular = torch.linspace(-2, 2, 600)[torch.randperm(600, generator=torch.Generator().manual_seed(5))]
    given.key[..., 0] = popular
    given.query[..., 0] = 6.0
    full, probes = AccumulatedAttention(normalise=True), NormalizedAttention(least_rows=2)
    chosen = [s.score(s.observe(given))[0].topk(360, -1).indices for s in (full, probes)]
    for a, b in zip(*chosen, strict=True):
        assert len(set(a.tolist()) & set(b.tolist())) > 0.8 * 360


@pytest.mark.parametrize(
    "scorer", [NormalizedAttention(), AccumulatedAttention(), AccumulatedAttention(normalise=True)]
)
def test_padding_changes_nothing(scorer: Scorer) -> None:
    given = view(60, 60)
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, :20] = False
    given.query[1, :, :20] = given.key[1, :, :20] = 1e3
    allowed = torch.ones(60, 60).tril().bool() & valid[:, None, None]
    seen = ScoreView(3, valid, given.query, given.key, allowed, given.scaling)
    found = scorer.score(scorer.observe(seen))
    for row, start in ((0, 0), (1, 20)):
        alone = ScoreView(
            3,
            None,
            given.query[row : row + 1, :, start:],
            given.key[row : row + 1, :, start:],
            None,
            given.scaling,
        )
        expected = scorer.score(scorer.observe(alone))
        torch.testing.assert_close(found[row : row + 1, :, start:], expected, rtol=1e-4, atol=1e-6)
    assert (found[1, :, :20] == 0).all()


@pytest.mark.parametrize(
    "scorer", [NormalizedAttention(), AccumulatedAttention(), AccumulatedAttention(normalise=True)]
)
def test_windows_count_what_they_see(scorer: Scorer) -> None:
    given = view(30, 30)
    allowed = torch.ones(30, 30).tril().bool() & torch.ones(30, 30).triu(-7).bool()
    found = scorer.observe(ScoreView(3, None, given.query, given.key, allowed[None, None], given.scaling))
    if "counts" in found:
        assert torch.equal(found["counts"][0, 0].long(), allowed.sum(0))
    expected = written_out(given, allowed, 0, 0).sum((0, 1))
    torch.testing.assert_close(found["sums"][0, 0].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scorer", [NormalizedAttention(), AccumulatedAttention()])
def test_bfloat16_is_scored_in_float32(scorer: Scorer) -> None:
    given = view(40, 40)
    half = ScoreView(3, None, given.query.bfloat16(), given.key.bfloat16(), None, given.scaling)
    wide = ScoreView(3, None, half.query.float(), half.key.float(), None, given.scaling)
    assert torch.equal(scorer.score(scorer.observe(half)), scorer.score(scorer.observe(wide)))


@pytest.mark.parametrize("scorer", [NormalizedAttention(), AccumulatedAttention()])
def test_a_view_without_queries_is_refused(scorer: Scorer) -> None:
    with pytest.raises(KvpackError, match="was not shown the queries"):
        scorer.observe(ScoreView(0))
