"""Factors that move range between a tensor and the weights that read it, against the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Group, Site, Stats
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.column_classes import ColumnClasses
from kvpack.parts.transforms.entropy_scale import EntropyScale
from kvpack.parts.transforms.range_scale import RangeScale
from kvpack.parts.transforms.searched_scale import SearchedScale
from tests.contracts.discovery import random

WIDTHS = [48, 64, 80, 172]
INT4 = Affine(bits=4, group=Group("channel", 32), zero="integer")
INT8 = Affine(bits=8, group=Group("channel", 0), zero="none")
NOWHERE = Site(layer=0)


def outliers(tokens: int, channels: int) -> Tensor:
    """Inputs of which a few channels are far larger than the others."""
    x = random(tokens, channels, seed=1)
    x[:, :3] *= 40
    return x


def stats(x: Tensor, weight: Tensor, heads: int = 1) -> Stats:
    """Everything the three parts ask for, of inputs [T, K*D] and readers [R, K*D], in float64 first."""
    apart = x.double().unflatten(-1, (heads, -1)).transpose(0, 1)
    rows = weight.unflatten(-1, (heads, -1)).transpose(0, 1)
    return {
        "channel_range": {"low": apart.amin(1).float(), "high": apart.amax(1).float()},
        "channel_magnitude": {"sum": apart.abs().sum(1), "count": torch.tensor(len(x))},
        "head_gram": {"gram": (apart.mT @ apart).float(), "count": torch.tensor(len(x))},
        "consumers.weight": {"weight": rows},
    }


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.3, 0.7), (1.0, 0.0)])
def test_ranges_are_shared_by_the_formula(channels: int, alpha: float, beta: float) -> None:
    x, weight = outliers(50, channels), random(24, channels, seed=2)
    factor = RangeScale(alpha, beta).fit(stats(x, weight))["factor"][0].double()
    raw = x.abs().amax(0).double() ** alpha / weight.abs().amax(0).double() ** beta
    assert torch.allclose(factor, raw / raw.log().mean().exp(), rtol=1e-5)
    assert factor.log().mean().abs() < 1e-5


def test_channels_that_are_never_active_or_never_read_keep_their_size() -> None:
    x, weight = outliers(50, 48), random(24, 48, seed=2)
    x[:, 7] = 0
    weight[:, 9] = 0
    for part in (RangeScale(), SearchedScale(codec=INT4), EntropyScale(codec=INT8, error=1.0)):
        factor = part.fit(stats(x, weight))["factor"]
        assert factor[0, [7, 9]].tolist() == [1.0, 1.0]
        assert bool(factor.isfinite().all())
        assert bool((factor > 0).all())


def test_factors_are_bounded() -> None:
    x = random(50, 48, seed=1)
    x[:, 0] *= 1e6
    factor = RangeScale(alpha=1.0, beta=0.0, limit=100.0).fit(stats(x, random(24, 48)))["factor"]
    assert factor.max() == 100.0


def output_error(x: Tensor, weight: Tensor, factor: Tensor, codec: Affine) -> float:
    rounded = codec.decode(codec.encode(weight * factor, {}), {}, torch.float32) / factor
    return float(((weight - rounded).double() @ x.double().T).square().sum())


@pytest.mark.parametrize("channels", WIDTHS)
def test_the_search_takes_the_best_of_all_exponents(channels: int) -> None:
    """AWQ: s = mean|x|^a / mean|w|^(1-a), the weights relative to the largest of their group."""
    x, weight = outliers(300, channels), random(24, channels, seed=2)
    found = SearchedScale(steps=10, group=32, codec=INT4).fit(stats(x, weight))["factor"][0]
    groups = weight.double().abs().split(32, -1)
    share = torch.cat([g / g.amax(-1, keepdim=True) for g in groups], -1).mean(0)
    candidates = [torch.ones(channels)]
    for a in torch.arange(1, 11).double() / 10:
        s = x.double().abs().mean(0) ** a / share ** (1 - a)
        candidates.append((s / (s.max() * s.min()).sqrt()).float())
    errors = [output_error(x, weight, s, INT4) for s in candidates]
    assert output_error(x, weight, found, INT4) == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.7 * errors[0]


def test_heads_are_searched_apart() -> None:
    x, weight = outliers(200, 64), random(24, 64, seed=2)
    both = SearchedScale(codec=INT4).fit(stats(x, weight, heads=2))["factor"]
    assert both.shape == (2, 32)


def test_what_a_search_cannot_try_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to search for"):
        SearchedScale().for_codec(None)
    with pytest.raises(RecipeError, match="has to learn"):
        SearchedScale().for_codec(ColumnClasses(INT4))
    with pytest.raises(RecipeError, match="symmetric"):
        EntropyScale().for_codec(INT4)
    assert SearchedScale(codec=INT8).for_codec(INT4).codec == INT8
    with pytest.raises(KvpackError, match="missing"):
        SearchedScale(codec=INT4).fit({})
    with pytest.raises(KvpackError, match="cannot be fitted"):
        RangeScale().fit({})


def bits_of(weight: Tensor) -> float:
    """Entropy of 8-bit codes with one step for the whole matrix, by counting."""
    codes = (weight.double() / (weight.double().abs().max() / 127)).round().flatten().tolist()
    counts = torch.tensor([codes.count(value) for value in set(codes)], dtype=torch.float64) / len(codes)
    return float(-(counts * counts.log2()).sum())


def test_outliers_in_activations_make_codes_compressible() -> None:
    """The larger the exponent, the fewer bits; the bound on the error stops it."""
    x, weight = outliers(400, 64), random(48, 64, seed=2)
    measured = stats(x, weight)
    free = EntropyScale(error=1.0, codec=INT8).fit(measured)["factor"][0]
    bound = EntropyScale(error=1e-5, codec=INT8).fit(measured)["factor"][0]
    assert bits_of(weight * free) < 0.8 * bits_of(weight)
    assert bits_of(weight * free) <= bits_of(weight * bound) <= bits_of(weight) + 1e-9
    bits = [
        bits_of(weight * EntropyScale(a, a, 1, 1.0, codec=INT8).fit(measured)["factor"][0])
        for a in (0.3, 0.5, 0.7, 0.9)
    ]
    assert bits == sorted(bits, reverse=True)


def test_the_error_bound_is_kept() -> None:
    x, weight = outliers(400, 64), random(48, 64, seed=2)
    for bound in (1e-4, 1e-3, 1e-2):
        factor = EntropyScale(error=bound, codec=INT8).fit(stats(x, weight))["factor"][0]
        scaled = weight * factor
        step = scaled.abs().max() / 127
        lost = (weight - (scaled / step).round() * step / factor) @ x.T
        assert float(lost.square().sum()) <= 1.05 * bound * float((weight @ x.T).square().sum())
