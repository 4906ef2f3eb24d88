"""GEAR's composition, recomputed slowly, and its acceptance checks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvpack.core.errors import RecipeError
from kvpack.core.roles import Codec
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.low_rank import LowRank
from kvpack.parts.codecs.residual import Residual
from kvpack.parts.codecs.split_channels import SplitChannels
from kvpack.parts.codecs.top_outliers import TopOutliers
from tests.contracts.discovery import random

KEYS, VALUES = Group("token", 16), Group("channel", 16)


def outliers(group: Group, bits: int = 2, keep: float = 0.02) -> TopOutliers:
    return TopOutliers(Affine(bits=bits, group=group), keep=keep, axis=group.axis, fill="mean")


def low_rank(rank: int = 4) -> LowRank:
    return LowRank(rank=rank, short_tokens=0, chunk_tokens=16)


def decoded(codec: Codec, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    return codec.decode(codec.encode(x, {}, valid), {}, torch.float32)


def error(codec: Codec, x: torch.Tensor) -> float:
    return (decoded(codec, x) - x).double().norm().item()


def attention_like(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """[2, 2, T, D]: a few wide channels, coherent tokens, some extreme entries"""
    x = random(2, 2, tokens, channels, seed=seed)
    x = x + 2 * random(2, 2, tokens, 3, seed=seed + 1) @ random(2, 2, 3, channels, seed=seed + 2)
    x[..., 1] *= 4
    spots = random(2, 2, tokens, channels, seed=seed + 3) > 2.5
    return torch.where(spots, 6 * x, x)


def grid(v: torch.Tensor, bits: int) -> torch.Tensor:
    """A vector through the card's asymmetric grid, minimum and scale rounded outwards to float16."""
    low = v.min().half()
    low = low if low.double() <= v.min() else torch.nextafter(low, torch.tensor(-torch.inf).half())
    exact = (v.max() - low.double()) / (2**bits - 1)
    scale = exact.half()
    scale = scale if scale.double() >= exact else torch.nextafter(scale, torch.tensor(torch.inf).half())
    if scale == 0:
        return v
    return ((v - low.double()) / scale.double()).round() * scale.double() + low.double()


def gear(x: torch.Tensor, group: Group, bits: int, keep: float, rank: int, seed: int = 0) -> torch.Tensor:
    """The card's steps 1 to 4 for one head [T, D], vector by vector in float64."""
    x = x.double()
    vectors = x.T if group.axis == "token" else x
    backbone = torch.zeros_like(vectors)
    for i, v in enumerate(vectors):
        order, each = v.argsort(), math.ceil(keep / 2 * len(v))
        taken = torch.cat((order[:each], order[len(v) - each :]))
        filled = v.clone()
        filled[taken] = v[order[each : len(v) - each]].mean()
        backbone[i] = torch.cat([grid(part, bits) for part in filled.split(group.size or len(v))])
        backbone[i, taken] = v[taken].half().double()
    backbone = backbone.T if group.axis == "token" else backbone
    rest = x - backbone
    right = torch.randn(x.shape[1], rank, generator=torch.Generator().manual_seed(seed)).double()
    for _ in range(3):
        left = torch.linalg.qr(rest @ torch.linalg.qr(right).Q).Q
        right = rest.T @ left
    return backbone + left @ right.T


@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("group", [KEYS, VALUES, Group("token", 0), Group("channel", 0)], ids=repr)
def test_it_is_the_published_composition(channels: int, group: Group) -> None:
    x = attention_like(48, channels)
    y = decoded(Residual(outliers(group, keep=0.1), low_rank()), x)
    for b in range(2):
        for k in range(2):
            expected = gear(x[b, k], group, 2, 0.1, 4)
            # A number at the border of two codes may fall to either side of it.
            near = ((y[b, k] - expected).abs() < 0.02 * x.abs().mean()).double().mean()
            assert near > 0.97


@pytest.mark.parametrize("group", [KEYS, VALUES], ids=repr)
def test_more_parts_smaller_error(group: Group) -> None:
    """At 2 bits: GEAR < GEAR-L < backbone, and GEAR < outliers alone < backbone."""
    x = attention_like(96, 64)
    backbone = Affine(bits=2, group=group)
    full = error(Residual(outliers(group), low_rank()), x)
    without_outliers = error(Residual(backbone, low_rank()), x)
    without_low_rank = error(outliers(group), x)
    assert full < without_outliers < error(backbone, x)
    assert full < without_low_rank < error(backbone, x)


@pytest.mark.parametrize("group", [KEYS, VALUES], ids=repr)
def test_error_falls_with_rank_and_with_outliers(group: Group) -> None:
    x = attention_like(96, 64)
    ranks = [error(Residual(outliers(group), low_rank(r)), x) for r in (1, 2, 4, 8, 16, 64)]
    shares = [error(Residual(outliers(group, keep=s), low_rank()), x) for s in (0.0, 0.02, 0.1, 0.3, 0.6)]
    for errors in (ranks, shares):
        assert errors == sorted(errors, reverse=True)
        assert len(set(errors)) == len(errors)


@pytest.mark.parametrize("group", [KEYS, VALUES], ids=repr)
def test_full_rank_is_exact_to_float16_and_all_outliers_are_exact(group: Group) -> None:
    x = attention_like(96, 64).half().float()
    assert error(Residual(Affine(bits=2, group=group), low_rank(64)), x) < 1e-3 * x.norm()
    assert error(Residual(outliers(group, keep=1.0), low_rank()), x) < 1e-6 * x.norm()


def test_a_batch_equals_its_rows() -> None:
    codec = Residual(outliers(KEYS), low_rank())
    x = attention_like(96, 64)
    both = decoded(codec, x)
    for row in range(2):
        torch.testing.assert_close(both[row : row + 1], decoded(codec, x[row : row + 1]), rtol=0, atol=1e-2)


def test_padding_takes_no_part() -> None:
    codec = Residual(outliers(KEYS), low_rank())
    x = attention_like(96, 64)
    valid = torch.ones(2, 96, dtype=torch.bool)
    valid[0, :32] = False
    loud = x.clone()
    loud[0, :, :32] *= 1000
    quiet, noisy = decoded(codec, x, valid), decoded(codec, loud, valid)
    assert torch.equal(quiet[:, :, 32:], noisy[:, :, 32:])
    left = codec.encode(loud, {}, valid).tensors["second.left"]
    assert left[0, :, :32].abs().max() < 1e-6


def test_bfloat16_and_equal_numbers() -> None:
    codec = Residual(outliers(KEYS), low_rank())
    x = torch.full((1, 2, 32, 16), -1.5)
    assert torch.equal(decoded(codec, x), x)
    y = codec.decode(codec.encode(attention_like(32, 16).bfloat16(), {}), {}, torch.bfloat16)
    assert y.dtype == torch.bfloat16


def test_blocks_and_segments_are_those_of_both() -> None:
    codec = Residual(Affine(bits=2, group=Group("token", 24)), low_rank())
    assert (codec.token_block, codec.segment) == (48, 4080)
    assert Residual(Affine(bits=2), Affine(bits=2)).segment == 0


def test_what_does_not_go_together_is_refused() -> None:
    learns = SplitChannels(Affine(bits=2), Affine(bits=4))
    with pytest.raises(RecipeError, match="second of a residual"):
        Residual(Affine(), learns)
    with pytest.raises(RecipeError, match="one whole block of 48"):
        Residual(Affine(group=Group("token", 24)), replace(low_rank(), segment_tokens=32))
    assert Residual(learns, Affine()).requires() == learns.requires()
    spec = Residual(outliers(KEYS), replace(low_rank(), rank=2)).spec((1, 2, 32, 8))
    assert {n.partition(".")[0] for n in spec} == {"first", "second"}
