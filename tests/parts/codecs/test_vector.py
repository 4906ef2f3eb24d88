"""Vector quantisation in the metric of the queries, against the card's formulas."""

import pytest
import torch
from torch import Tensor

from kvpack import ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.parts.codecs.vector import Vector
from tests.contracts.discovery import random, specs


def keys_and_queries(tokens: int, channels: int, seed: int = 0, heads: int = 2) -> tuple[Tensor, Tensor]:
    """Keys and queries [K, N, D] whose large directions differ, as those of models do."""
    strong = torch.logspace(0.7, -1.3, channels)
    keys = random(heads, tokens, channels, seed=seed) * strong.roll(channels // 3) + 1.0
    return keys, random(heads, tokens, channels, seed=seed + 1) * strong


def stats(keys: Tensor, queries: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"all_rows": {"rows": keys}, "query.head_gram": {"gram": queries.mT @ queries}}


@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
def test_distances_in_the_metric_are_squared_errors_of_scores(channels: int) -> None:
    queries = keys_and_queries(400, channels)[1]
    gram = queries.double().mT @ queries.double()
    chol = ops.query_metric.factor(gram).double()
    error = random(2, 5, channels, seed=9).double()
    scale = gram.square().mean((1, 2)).sqrt()
    scores = (queries.double() @ error.mT).square().sum(1) / scale[:, None]
    distances = (error @ chol).square().sum(-1)
    normal = gram / scale[:, None, None]
    damping = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(-1)
    assert torch.allclose(distances - damping[:, None] * error.square().sum(-1), scores, rtol=1e-3)
    assert (damping[:, None] * error.square().sum(-1) / scores).max() < 0.05


@pytest.mark.parametrize("metric", ["query", "euclidean"])
@pytest.mark.parametrize(("channels", "pieces"), [(8, 1), (48, 3), (64, 2), (80, 1), (128, 4)])
def test_encodes_and_decodes_as_the_card_says(metric: str, channels: int, pieces: int) -> None:
    keys, queries = keys_and_queries(160, channels)
    codec = Vector(bits=3, metric=metric, sub_vectors=pieces)
    state = codec.fit(stats(keys, queries))
    assert specs(state) == codec.state_spec((1, 2, 1, channels))
    x = keys_and_queries(7, channels, seed=5)[0][None]
    payload = codec.encode(x, state)
    assert payload.nbytes == 2 * 7 * -(-3 * pieces // 8)
    decoded = codec.decode(payload, state, torch.float64)
    for head in range(2):
        factor = state["chol"][head].double() if metric == "query" else torch.eye(channels).double()
        books = state["codebook"][head].double()
        for token in range(7):
            z = (x[0, head, token].double() @ factor).split(channels // pieces)
            best = [
                book[(piece - book).square().sum(-1).argmin()] for piece, book in zip(z, books, strict=True)
            ]
            expected = torch.cat(best) @ torch.linalg.inv(factor)
            assert torch.allclose(decoded[0, head, token], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("metric", ["query", "euclidean"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_scores_are_products_with_what_is_decoded(metric: str, pieces: int) -> None:
    keys, queries = keys_and_queries(300, 16)
    codec = Vector(bits=4, metric=metric, sub_vectors=pieces)
    state = codec.fit(stats(keys, queries))
    payload = codec.encode(random(3, 2, 9, 16), state)
    q = random(3, 2, 5, 16, seed=2)
    expected = q @ codec.decode(payload, state, torch.float32).mT
    assert torch.allclose(codec.scores(q, payload, state), expected, atol=1e-3, rtol=1e-3)
    flat = codec.encode(random(9, 16), {n: t[:1] for n, t in state.items()})
    assert codec.scores(q[0, 0], flat, {n: t[:1] for n, t in state.items()}).shape == (5, 9)


def test_the_metric_of_the_queries_beats_the_euclidean_one_on_unseen_tokens() -> None:
    seen, unseen = keys_and_queries(2048, 32, heads=1), keys_and_queries(1000, 32, seed=40, heads=1)
    exact = unseen[1] @ unseen[0].mT
    errors, recalls = [], []
    for metric in ("query", "euclidean"):
        codec = Vector(bits=7, metric=metric)
        state = codec.fit(stats(*seen))
        found = codec.scores(unseen[1], codec.encode(unseen[0], state), state)
        errors.append((found - exact).square().mean().item())
        top = [s.topk(30, -1).indices for s in (found, exact)]
        recalls.append((top[0].unsqueeze(-1) == top[1].unsqueeze(-2)).any(-1).double().mean().item())
    assert errors[0] < 0.9 * errors[1]
    assert recalls[0] > recalls[1]


@pytest.mark.parametrize(
    ("bits", "pieces", "nbytes"), [(12, 1, 2), (12, 2, 3), (8, 2, 2), (10, 4, 5), (16, 1, 2)]
)
def test_bytes_per_token_and_head(bits: int, pieces: int, nbytes: int) -> None:
    codec = Vector(bits=bits, sub_vectors=pieces)
    assert codec.spec((1, 8, 100, 128))["codes"].nbytes == 8 * 100 * nbytes
    assert codec.state_spec((1, 8, 1, 128))["codebook"].nbytes == 8 * 2**bits * 128 * 2


@pytest.mark.parametrize("bits", [1, 8, 9, 11, 12, 16])
def test_wide_codes_survive_packing(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 5), generator=torch.Generator().manual_seed(bits))
    packed = ops.bits.pack_wide(codes, bits)
    assert packed.shape[-1] == ops.bits.packed_size(5, bits)
    assert torch.equal(ops.bits.unpack_wide(packed, bits, 5), codes)


def test_too_little_text_is_refused_with_what_fits() -> None:
    with pytest.raises(RecipeError, match="4,096 centroids cannot be learned from 16,384") as caught:
        Vector(bits=12).for_rows(16_384)
    assert "set bits to 10 (1024 centroids)" in caught.value.hint
    assert Vector(bits=10).for_rows(16_384) == Vector(bits=10)
    with pytest.raises(RecipeError, match="16 centroids"):
        Vector(bits=4).fit(stats(*keys_and_queries(100, 8)))


@pytest.mark.parametrize(("rows", "bits"), [(65_536, 12), (10**7, 12), (65_535, 11), (128, 3), (32, 1)])
def test_no_bits_mean_as_many_as_the_text_allows(rows: int, bits: int) -> None:
    assert Vector(bits=0).for_rows(rows) == Vector(bits=bits)


def test_no_text_at_all_is_refused() -> None:
    with pytest.raises(RecipeError, match="2 centroids"):
        Vector(bits=0).for_rows(31)


def test_pieces_must_divide_the_channels() -> None:
    with pytest.raises(RecipeError, match="80 channels") as caught:
        Vector(bits=4, sub_vectors=3).state_spec((1, 2, 1, 80))
    assert "sub_vectors to 2" in caught.value.hint


def test_nothing_measured_and_bad_numbers_are_refused() -> None:
    keys, queries = keys_and_queries(64, 8)
    with pytest.raises(KvpackError, match=r"query\.head_gram were not measured"):
        Vector(bits=2).fit({"all_rows": {"rows": keys}})
    with pytest.raises(KvpackError, match="all_rows are not finite"):
        Vector(bits=2).fit(stats(keys / 0, queries))


def test_equal_keys_and_silent_queries() -> None:
    keys = torch.full((2, 64, 8), 3.0)
    codec = Vector(bits=2)
    state = codec.fit(stats(keys, torch.zeros(2, 5, 8)))
    assert torch.allclose(codec.decode(codec.encode(keys, state), state, torch.float32), keys, rtol=1e-2)
