"""SmoothAttention's factors against the card's formulas, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import KvpackError
from kvpack.core.types import Group, Site, Stats
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.transforms.channel_scale import ChannelScale
from tests.contracts.discovery import stats_of
from tests.contracts.test_transforms import HalfRope

AT = Site(0, kv_heads=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keys(width: int, tokens: int = 200, heads: int = 2) -> Tensor:
    x = normal(2, heads, tokens, width)
    x[:, 0, :, 1::5] *= 15
    x[:, 1, :, 2] += 20
    return x


def with_partner(stats: Stats, partner: list[int]) -> Stats:
    return {**stats, "rope.partner": {"partner": torch.tensor(partner)}}


@pytest.mark.parametrize("width", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 200])
def test_factors_are_the_cards(width: int, tokens: int) -> None:
    x = keys(width, tokens)
    factor = ChannelScale().fit(stats_of(ChannelScale(), x))["factor"]
    for head in range(2):
        for i in range(width):
            partner = (i + width // 2) % width
            peak = max(float(x[:, head, :, c].abs().max()) for c in (i, partner))
            assert float(factor[head, i]) == pytest.approx(peak**0.5, rel=1e-6)


def test_only_the_rotated_channels_are_tied() -> None:
    x = keys(8)
    stats = with_partner(stats_of(ChannelScale(), x), [2, 3, 0, 1, 4, 5, 6, 7])
    factor = ChannelScale().fit(stats)["factor"]
    peak = x.abs().amax((0, 2))
    assert torch.equal(factor[:, :2], factor[:, 2:4])
    assert torch.allclose(factor[:, 4:], peak[:, 4:].sqrt())


def test_a_dead_channel_keeps_its_scale() -> None:
    x = keys(8)
    x[..., [3, 7]] = 0
    factor = ChannelScale().fit(stats_of(ChannelScale(), x))["factor"]
    assert (factor[:, [3, 7]] == 1).all()
    assert factor.isfinite().all()


def test_alpha_says_how_much_moves() -> None:
    x = keys(48)
    stats = stats_of(ChannelScale(), x)
    assert (ChannelScale(alpha=0.0).fit(stats)["factor"] == 1).all()
    flat = ChannelScale(alpha=1.0)
    scaled = flat.forward(x, flat.fit(stats), AT)
    assert scaled.abs().max() == pytest.approx(1.0)


def test_it_commutes_with_rope() -> None:
    """Scaled before RoPE or after it, keys and queries and their products are the same."""
    part, rope, positions = ChannelScale(), HalfRope(), torch.arange(30)[None]
    x, q = keys(64, 30), normal(2, 4, 30, 64, seed=3)
    state = part.fit(stats_of(part, rope.apply(x, positions)))
    before = rope.apply(part.forward(x, state, AT), positions)
    after = part.forward(rope.apply(x, positions), state, AT)
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-5)
    query = rope.apply(part.dual(q, state, AT), positions)
    assert torch.allclose(query, part.dual(rope.apply(q, positions), state, AT), rtol=1e-4, atol=1e-4)
    scores = query @ after.repeat_interleave(2, 1).mT
    exact = rope.apply(q, positions) @ rope.apply(x, positions).repeat_interleave(2, 1).mT
    assert torch.allclose(scores, exact, rtol=1e-4, atol=1e-3)


def test_untied_factors_would_not() -> None:
    part, rope, positions = ChannelScale(), HalfRope(), torch.arange(30)[None]
    x = keys(64, 30)
    state = part.fit(with_partner(stats_of(part, x), list(range(64))))
    before = rope.apply(part.forward(x, state, AT), positions)
    assert not torch.allclose(before, part.forward(rope.apply(x, positions), state, AT), atol=0.1)


def test_scores_lose_less_where_channels_stick_out() -> None:
    part, codec = ChannelScale(), Affine(bits=4, group=Group("channel", 0))
    x = normal(1, 2, 300, 64)
    x[..., [5, 37]] *= 20  # a RoPE pair, as after rotation
    q = normal(1, 2, 64, 64, seed=1)
    q[..., [5, 37]] /= 20
    state = part.fit(stats_of(part, x))

    def loss(stored: Tensor, query: Tensor) -> float:
        held = codec.decode(codec.encode(stored, {}), {}, torch.float32)
        return float((query @ held.mT - q @ x.mT).square().mean())

    assert loss(part.forward(x, state, AT), part.dual(q, state, AT)) < 0.5 * loss(x, q)


@pytest.mark.parametrize("width", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_float_zero_grid_is_the_papers(bits: int, width: int) -> None:
    """round(x/s + z) with the real zero z = -L*min/(max - min) is the grid of the stored minimum."""
    codec = Affine(bits=bits, group=Group("channel", 0), scale_dtype="float32")
    x = normal(2, 2, 7, width) + 0.3
    top = 2**bits - 1
    low, high = x.double().amin(-1, keepdim=True), x.double().amax(-1, keepdim=True)
    step, zero = (high - low) / top, -top * low / (high - low)
    codes = (x.double() / step + zero).round().clamp(0, top)
    found = codec.decode(codec.encode(x, {}), {}, torch.float32)
    close = ((x.double() / step + zero) % 1 - 0.5).abs() < 1e-4  # ties may fall to either side
    assert torch.allclose(found.double()[~close], ((codes - zero) * step)[~close], atol=1e-5)
    half = replace(codec, scale_dtype="float16")
    assert half.encode(x, {}).bits_per_element == pytest.approx(bits + 32 / width)
    constant = torch.full((1, 2, 3, width), 2.5)
    assert torch.equal(half.decode(half.encode(constant, {}), {}, torch.float32), constant)
    error = (half.decode(half.encode(x, {}), {}, torch.float32) - x).abs().double()
    assert (error <= step * 0.51).all()


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(KvpackError, match="not measured"):
        ChannelScale().fit({})
    x = keys(8)
    x[0, 0, 0, 0] = torch.inf
    with pytest.raises(KvpackError, match="not finite"):
        ChannelScale().fit(stats_of(ChannelScale(), x))
