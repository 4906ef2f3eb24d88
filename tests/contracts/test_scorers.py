"""What every scorer promises."""

import pytest
import torch

from kvpack.core.roles import Scorer
from kvpack.core.types import ScoreView, State
from tests.contracts.discovery import parts, random, specs

SCORERS = parts("scorers")


def seen(scorer: Scorer, tokens: int = 50, batch: int = 2) -> ScoreView:
    if scorer.needs == "embeddings":
        return ScoreView(0, embeddings=random(batch, tokens, 16))
    return ScoreView(0, None, random(batch, 4, tokens, 8), random(batch, 2, tokens, 8, seed=1), None, 0.35)


def one_row(observed: State) -> State:
    return {name: tensor[:1] for name, tensor in observed.items()}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_observed_is_the_announced_one(scorer: Scorer, tokens: int) -> None:
    found = scorer.observe(seen(scorer, tokens))
    assert specs(one_row(found)) == scorer.observed_spec(2, tokens)
    score = scorer.score(found)
    assert score.shape in {(2, 1, tokens), (2, 2, tokens)}
    assert score.isfinite().all()


@pytest.mark.parametrize("scorer", SCORERS)
def test_rows_do_not_see_each_other(scorer: Scorer) -> None:
    whole = seen(scorer)
    fields = ("query", "key", "embeddings")
    given = {name: getattr(whole, name)[1:] for name in fields if getattr(whole, name) is not None}
    alone = ScoreView(0, scaling=whole.scaling, **given)
    torch.testing.assert_close(scorer.score(scorer.observe(alone)), scorer.score(scorer.observe(whole))[1:])


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_are_read_from_sums_token_by_token(scorer: Scorer) -> None:
    """A cache adds passes up and cuts the token axis."""
    found = scorer.observe(seen(scorer))
    twice = {name: tensor + tensor for name, tensor in found.items()}
    assert (scorer.score(twice).argsort() == scorer.score(found).argsort()).all()
    cut = {name: tensor[..., 10:30] for name, tensor in found.items()}
    assert torch.equal(scorer.score(cut), scorer.score(found)[..., 10:30])


@pytest.mark.parametrize("scorer", SCORERS)
def test_observing_leaves_its_input_alone_and_repeats(scorer: Scorer) -> None:
    view = seen(scorer)
    first, second = scorer.observe(view), scorer.observe(view)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
