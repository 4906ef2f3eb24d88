"""Outliers kept exact: a slow re-computation, ties, padding and bytes."""

import math

import numpy as np
import pytest
import torch

from kvpack.core.errors import RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.cast import Cast
from kvpack.parts.codecs.codebook import Codebook
from kvpack.parts.codecs.top_outliers import TopOutliers
from tests.contracts.discovery import fitted, random

TWO_BIT = Affine(bits=2, group=Group("channel", 0))


def decoded(codec: TopOutliers, x: torch.Tensor, state=None, valid=None) -> torch.Tensor:
    state = state or {}
    return codec.decode(codec.encode(x, state, valid), state, torch.float32)


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers with a few large ones."""
    x = random(*shape, seed=seed)
    return x * torch.where(random(*shape, seed=seed + 1).abs() > 2.5, 20.0, 1.0)


def by_hand(x: torch.Tensor, keep: float, dim: int, fill: str, inner) -> torch.Tensor:
    """One vector after the other in float64: sort, take both ends out, fill, encode, put back."""
    filled, places = x.double().clone(), []
    moved, source = filled.movedim(dim, -1), x.double().movedim(dim, -1)
    each = math.ceil(round(keep / 2 * x.shape[dim], 9))
    for index in np.ndindex(tuple(moved.shape[:-1])):
        order = source[index].argsort(stable=True)
        taken = torch.cat((order[:each], order[len(order) - each :]))
        rest = order[each : len(order) - each]
        middle = source[index][rest].mean() if fill == "mean" else source[index][rest[(len(rest) - 1) // 2]]
        moved[index][taken] = middle
        places.append((index, taken))
    result = inner.decode(inner.encode(filled.float(), {}), {}, torch.float32).double().movedim(dim, -1)
    for index, taken in places:
        result[index][taken] = source[index][taken].half().double()
    return result.movedim(-1, dim)


@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("fill", ["median", "mean"])
def test_along_channels_equals_the_slow_way(channels: int, tokens: int, fill: str) -> None:
    x = heavy(2, 2, tokens, channels)
    codec = TopOutliers(TWO_BIT, keep=0.05, fill=fill)
    expected = by_hand(x, 0.05, -1, fill, TWO_BIT)
    assert torch.allclose(decoded(codec, x).double(), expected, atol=1e-4)


@pytest.mark.parametrize("channels", [8, 48, 64])
@pytest.mark.parametrize("tokens", [8, 100])
@pytest.mark.parametrize("fill", ["median", "mean"])
def test_along_tokens_equals_the_slow_way(channels: int, tokens: int, fill: str) -> None:
    x, inner = heavy(2, 2, tokens, channels), Affine(bits=2, group=Group("token", 4))
    codec = TopOutliers(inner, keep=0.02, axis="token", fill=fill)
    expected = by_hand(x, 0.02, -2, fill, inner)
    assert torch.allclose(decoded(codec, x).double(), expected, atol=1e-4)


def test_along_tokens_counts_as_gear_does() -> None:
    codec = TopOutliers(Affine(bits=2, group=Group("token", 8)), keep=0.02, axis="token")
    assert codec.spec((1, 2, 1000, 64))["outliers"].shape == (1, 2, 20, 64)
    assert codec.spec((1, 2, 8, 64))["places"].shape == (1, 2, 2, 64)
    assert codec.segment == 4096
    assert codec.token_block == 8


def test_thresholds_choose_what_is_farthest_out_of_its_range() -> None:
    x = heavy(2, 1, 200, 64) * torch.linspace(0.1, 10, 64) + torch.linspace(-5, 5, 64)
    codec = TopOutliers(Cast(), keep=0.05, select="threshold")
    state = fitted(codec, x)
    rows = x[:, 0].flatten(0, 1).sort(0).values.double()
    out = int(0.025 * 400)
    lower, upper = rows[out], rows[399 - out]
    assert torch.allclose(state["lower"][0].double(), lower, rtol=1e-3)
    assert torch.allclose(state["upper"][0].double(), upper, rtol=1e-3)
    lower, upper = state["lower"].double(), state["upper"].double()
    distance = (x.double() - (lower + upper) / 2).abs() / ((upper - lower) / 2)
    expected = distance.argsort(-1, descending=True)[..., :4]
    places = codec.encode(x, state).tensors["places"]
    assert torch.equal(places.long().sort(-1).values, expected.sort(-1).values)


def test_kept_entries_are_exact_and_the_rest_gains() -> None:
    x = heavy(1, 1, 50, 128).half().float()
    codec = TopOutliers(TWO_BIT, keep=0.05)
    y, places = decoded(codec, x), codec.encode(x, {}).tensors["places"].long()
    assert torch.equal(y.gather(-1, places), x.gather(-1, places))
    dense = TWO_BIT.decode(TWO_BIT.encode(x, {}), {}, torch.float32)
    assert (y - x).square().mean() < 0.2 * (dense - x).square().mean()


def test_per_vector_beats_per_matrix_at_equal_count() -> None:
    """KVQuant's ablation: the same number of outliers, but chosen over the whole matrix.

    Errors count in units of their token, as tokens matter alike to attention.
    """
    widths = torch.linspace(0.2, 4, 200)[:, None]
    x = heavy(1, 1, 200, 128) * widths
    codec = TopOutliers(TWO_BIT, keep=0.03)
    count = codec.encode(x, {}).tensors["outliers"].numel()
    places = (x - x.median()).abs().flatten().topk(count).indices
    filled = x.flatten().index_fill(0, places, float(x.median())).view_as(x)
    matrix = TWO_BIT.decode(TWO_BIT.encode(filled, {}), {}, torch.float32).flatten()
    matrix[places] = x.flatten()[places]
    errors = [((y.view_as(x) - x) / widths).square().mean() for y in (decoded(codec, x), matrix)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("shape", [(1, 1, 4, 8), (2, 3, 8, 7), (2, 1, 4, 300)])
def test_keeping_everything_is_exact(axis: str, shape: tuple[int, ...]) -> None:
    x = random(*shape)
    codec = TopOutliers(TWO_BIT, keep=1.0, axis=axis, dtype="float32")
    assert torch.equal(decoded(codec, x), x)
    assert torch.equal(decoded(TopOutliers(TWO_BIT, keep=1.0, axis=axis), x.half()), x.half().float())


def test_keeping_nothing_is_the_codec_alone() -> None:
    x = random(2, 2, 5, 40)
    for axis in ("channel", "token"):
        y = decoded(TopOutliers(TWO_BIT, keep=0.0, axis=axis), x)
        assert torch.equal(y, TWO_BIT.decode(TWO_BIT.encode(x, {}), {}, torch.float32))


def test_ties_take_no_more_than_the_count() -> None:
    x = torch.zeros(1, 1, 3, 100)
    x[..., :40] = 7.0
    codec = TopOutliers(TWO_BIT, keep=0.01)
    payload = codec.encode(x, {})
    assert payload.tensors["outliers"].shape[-1] == 2
    assert torch.allclose(codec.decode(payload, {}, torch.float32), x, atol=1e-2)


def test_padding_takes_no_slot_along_tokens() -> None:
    x = random(2, 1, 32, 6)
    valid = torch.ones(2, 32, dtype=torch.bool)
    valid[0, :9] = False
    padded = x.masked_fill(~valid[:, None, :, None], 1e4)
    codec = TopOutliers(Affine(bits=2, group=Group("channel", 0)), keep=0.1, axis="token")
    places = codec.encode(padded, {}, valid).tensors["places"].long()
    assert (places[0] >= 9).all()
    alone = codec.encode(x[1:], {})
    assert torch.equal(places[1:], alone.tensors["places"].long())


def test_bfloat16_and_numbers_beyond_float16() -> None:
    x = heavy(1, 2, 4, 64).bfloat16()
    codec = TopOutliers(TWO_BIT, keep=0.1)
    y, places = decoded(codec, x), codec.encode(x, {}).tensors["places"].long()
    assert torch.equal(y.gather(-1, places), x.float().gather(-1, places))
    x[..., 0] = 1e6
    assert decoded(codec, x)[..., 0].eq(65504).all()
    wide = TopOutliers(TWO_BIT, keep=0.1, dtype="bfloat16")
    assert torch.equal(decoded(wide, x)[..., 0], x[..., 0].float())


def test_contradictions_are_refused() -> None:
    with pytest.raises(RecipeError, match="thresholds belong to channels"):
        TopOutliers(TWO_BIT, axis="token", select="threshold")
    with pytest.raises(RecipeError, match="segments of 100 tokens"):
        TopOutliers(Affine(group=Group("token", 32)), axis="token", segment_tokens=100)


@pytest.mark.parametrize(("channels", "index"), [(64, 8), (256, 8), (1024, 16), (4096, 16)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_are_those_of_the_formula(channels: int, index: int, bits: int) -> None:
    """b + rho * (16 + index), and 32/C for the ranges of values; the paper adds 32/C for a pointer."""
    rho = 2 * math.ceil(0.005 * channels) / channels
    for axis, select in (("channel", "threshold"), ("token", "rank")):
        codec = TopOutliers(Codebook(bits, axis), select=select)
        specs = codec.spec((1, 1, 100, channels)).values()
        stored = 8 * sum(s.nbytes for s in specs) / (100 * channels)
        formula = bits + rho * (16 + index) + (32 / channels if axis == "token" else 0)
        assert stored == pytest.approx(formula, rel=1e-9)
    if channels == 4096:
        paper = bits + 0.01 * 32 + 2 * 32 / channels
        assert stored == pytest.approx(paper, rel=0.01)
