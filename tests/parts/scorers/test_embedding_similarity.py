"""VidKV's semantic token protection (2503.16257): similarity of input embeddings to the text."""

import pytest
import torch

from kvpack.core.errors import KvpackError
from kvpack.core.types import Group, ScoreView
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.ternary import Ternary
from kvpack.parts.policies.top_fraction import TopFraction
from kvpack.parts.scorers.embedding_similarity import EmbeddingSimilarity
from kvpack.report import kv_bytes
from kvpack.runtime.install import new_cache
from tests.contracts.discovery import random
from tests.runtime.ranked import Ranked
from tests.runtime.schemes import logits, text, tiny


@pytest.mark.parametrize("tokens", [1, 5, 60])
@pytest.mark.parametrize("told", [False, True])
def test_it_is_the_mean_product_with_text_tokens(tokens: int, told: bool) -> None:
    x = random(2, tokens, 12)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, : tokens // 2] = False
    kinds = (torch.arange(tokens) % 3 == 0).expand(2, -1) if told else None
    scorer = EmbeddingSimilarity(question_tokens=4)
    found = scorer.score(scorer.observe(ScoreView(0, valid, embeddings=x, text=kinds)))
    for row in range(2):
        real = [j for j in range(tokens) if valid[row, j]]
        chosen = [j for j in real if told and j % 3 == 0] or real[-4:]
        for i in range(tokens):
            expected = sum(float(x[row, i].double() @ x[row, j].double()) for j in chosen) / len(chosen)
            assert float(found[row, 0, i]) == pytest.approx(expected, abs=1e-4)


def test_without_embeddings_it_says_what_is_missing() -> None:
    with pytest.raises(KvpackError, match="not shown the input embeddings"):
        EmbeddingSimilarity().observe(ScoreView(0))


def scheme(share: float) -> Ranked:
    key = Affine(bits=2, group=Group("token", 8))
    values = (Affine(bits=2, group=Group("token", 8)), Ternary(group=Group("token", 8)))
    return Ranked((key, key), values, TopFraction(EmbeddingSimilarity(4), share=share, interval=16))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_values_are_ranked_and_keys_go_by_age(family: str, share: float) -> None:
    plan = scheme(share)
    model = plan.install(tiny(family))
    cache = new_cache(model)
    ids = text(60)
    logits(model, ids, cache, [50, *[1] * 10])
    assert cache.get_seq_length() == 60
    if family == "llama":
        model2 = model
        one = new_cache(model2)
        logits(model2, ids, one)
        assert one.nbytes == kv_bytes(plan.plans(model2), 60, "float32").total
        layer = one.layers[0]
        embeddings = model2.get_input_embeddings()(ids)[0]
        similar = (embeddings @ embeddings[-4:].mean(0))[:48]
        best = set(similar.topk(int(share * 48 + 1e-9)).indices.tolist())
        assert set(layer._ranking.chunks[0].mask()[0, 0].nonzero().flatten().tolist()) == best
        assert layer._planes["key"].tiers[1].tokens == 0


def test_the_callers_token_types_tell_the_text() -> None:
    model = scheme(0.3).install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    ids = text(48)
    kinds = torch.ones_like(ids)
    kinds[:, 5:9] = 0
    embeddings = model.get_input_embeddings()(ids)[0]
    with torch.no_grad():
        model.base_model(ids, past_key_values=cache, use_cache=True, token_type_ids=kinds)
    best = (embeddings @ embeddings[5:9].mean(0)).topk(14).indices
    mask = cache.layers[0]._ranking.chunks[0].mask()[0, 1]
    assert set(mask.nonzero().flatten().tolist()) == set(best.tolist())
