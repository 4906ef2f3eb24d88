"""Wide and narrow channels: the choice, the paper's comparison, errors and bytes."""

from __future__ import annotations

import pytest
import torch

from kvpack.calibrate.stats import accumulator
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.roles import Codec
from kvpack.core.types import Group, State
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.binary import Binary
from kvpack.parts.codecs.in_basis import InBasis
from kvpack.parts.codecs.low_rank import LowRank
from kvpack.parts.codecs.split_channels import SplitChannels
from tests.contracts.discovery import random, stats_of

TWO_BITS, SIGNS = Affine(bits=2, group=Group("token", 32)), Binary(Group("token", 32))


def keys(channels: int = 64, tokens: int = 64, seed: int = 0) -> torch.Tensor:
    """[2, 3, T, D] with a few wide channels, the same in every head."""
    x = random(2, 3, tokens, channels, seed=seed)
    x[..., ::7] *= 10
    return x


def error(codec: Codec, state: State, x: torch.Tensor) -> float:
    y = codec.decode(codec.encode(x, state), state, torch.float32)
    return ((y - x).norm() / x.norm()).item()


@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.01])
def test_the_widest_channels_over_all_heads_come_first(channels: int, share: float) -> None:
    codec, x = SplitChannels(TWO_BITS, SIGNS, share=share), keys(channels)
    ranges = [(x[..., d].max() - x[..., d].min()).item() for d in range(channels)]
    wide = max(1, int(channels * share + 1e-9))
    expected = sorted(range(channels), key=lambda d: -ranges[d])
    order = codec.fit(stats_of(codec, x))["order"].tolist()
    assert order == sorted(expected[:wide]) + sorted(expected[wide:])


def test_every_head_may_choose() -> None:
    codec, x = SplitChannels(TWO_BITS, SIGNS, share=0.1, per_head=True), random(2, 3, 64, 20)
    for head in range(3):
        x[:, head, :, 5 * head] *= 10
    order = codec.fit(stats_of(codec, x))["order"]
    assert order.shape == (3, 20)
    for head in range(3):
        assert 5 * head in order[head, :2].tolist()


@pytest.mark.parametrize("per_head", [False, True])
def test_each_side_is_what_its_codec_makes_of_it(per_head: bool) -> None:
    codec, x = SplitChannels(TWO_BITS, InBasis(SIGNS), share=0.3, per_head=per_head), keys(40)
    state = codec.fit(stats_of(codec, x))
    assert {n: tuple(t.shape) for n, t in state.items()} == {
        n: s.shape for n, s in codec.state_spec((2, 3, 64, 40)).items()
    }
    y = codec.decode(codec.encode(x, state), state, torch.float32)
    for head in range(3):
        order = (state["order"][head] if per_head else state["order"]).long()
        for side, chosen in ((TWO_BITS, order[:12]), (InBasis(SIGNS), order[12:])):
            part = x[:, head : head + 1][..., chosen]
            expected = side.decode(side.encode(part, {}), {}, torch.float32)
            assert torch.equal(y[:, head : head + 1][..., chosen], expected)


def test_mixed_widths_beat_signs_alone_and_errors_fall_with_the_share() -> None:
    x = keys()
    codecs = [SplitChannels(TWO_BITS, SIGNS, share=s) for s in (0.25, 0.5, 0.75)]
    errors = [error(c, c.fit(stats_of(c, x)), keys(seed=1)) for c in codecs]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < error(SIGNS, {}, keys(seed=1))


@pytest.mark.parametrize(("share", "bits"), [(0.25, 1.875), (0.5, 2.25), (0.75, 2.625)])
def test_bits_are_the_formula(share: float, bits: float) -> None:
    """share * (2 + 32/32) + (1 - share) * (1 + 16/32)."""
    codec = SplitChannels(TWO_BITS, InBasis(SIGNS), share=share)
    state = codec.fit(stats_of(codec, keys()))
    assert codec.encode(keys(), state).bits_per_element == bits


def test_blocks_and_segments_are_those_of_both() -> None:
    codec = SplitChannels(Affine(group=Group("token", 24)), LowRank(rank=2, chunk_tokens=32))
    assert (codec.token_block, codec.segment) == (96, 4032)
    assert SplitChannels(TWO_BITS, SIGNS).segment == 0


def test_unusable_settings_and_statistics_are_refused() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(RecipeError, match="one side"):
            SplitChannels(TWO_BITS, SIGNS, share=share)
    with pytest.raises(RecipeError, match="selection of channels"):
        SplitChannels(TWO_BITS, SplitChannels(TWO_BITS, SIGNS))
    codec = SplitChannels(TWO_BITS, SIGNS)
    with pytest.raises(RecipeError, match="one channel"):
        codec.spec((1, 2, 32, 1))
    with pytest.raises(KvpackError, match="not measured"):
        codec.fit({})
    broken = accumulator("channel_range")
    broken.update(torch.full((1, 2, 4, 8), torch.nan))
    with pytest.raises(KvpackError, match="not finite"):
        codec.fit({"channel_range": broken.state()})
