"""RotateKV's chain: un-RoPE aside, rotate groups of heads, then sort channels by mean."""

import pytest
import torch

from kvpack.core.errors import KvpackError
from kvpack.core.types import Site
from kvpack.ops import affine
from kvpack.parts.transforms.channel_reorder import ChannelReorder
from kvpack.parts.transforms.hadamard import Hadamard
from kvpack.parts.transforms.unrope import Unrope
from tests.contracts.discovery import random, stats_of

AT = Site(layer=2, kv_heads=8)


def keys(seed: int) -> torch.Tensor:
    """Keys with consistent channel means, as pre-RoPE keys have."""
    means = 3 * random(1, 8, 1, 64, seed=99)
    return means + random(2, 8, 40, 64, seed=seed)


def test_chain_restores_the_head_layout() -> None:
    x = keys(0)
    rotate, reorder = Hadamard(heads=4), ChannelReorder()
    rotated = rotate.forward(x, {}, AT)
    assert rotated.shape == (2, 2, 40, 256)
    state = reorder.fit(stats_of(reorder, rotated))
    z = reorder.forward(rotated, state, AT)
    assert z.shape == (2, 1, 40, 512)
    back = rotate.inverse(reorder.inverse(z, state, AT), {}, AT)
    assert torch.allclose(back, x, atol=1e-5)


def test_order_is_a_bijection_by_ascending_mean() -> None:
    reorder = ChannelReorder()
    x = keys(0)
    state = reorder.fit(stats_of(reorder, x))
    assert state["perm"].flatten().sort().values.tolist() == list(range(512))
    means = reorder.forward(x, state, AT).double().mean((0, 1, 2))
    assert (means.diff() >= -1e-6).all()


def test_ties_keep_their_order() -> None:
    stats = {"channel_sum": {"sum": torch.zeros(2, 8, dtype=torch.float64)}}
    assert ChannelReorder().fit(stats)["perm"].flatten().tolist() == list(range(16))


@pytest.mark.parametrize("seed", [0, 1], ids=["calibration", "held-out"])
def test_reordering_narrows_the_groups(seed: int) -> None:
    reorder, rotate = ChannelReorder(), Hadamard(heads=4)
    state = reorder.fit(stats_of(reorder, rotate.forward(keys(0), {}, AT)))
    before = rotate.forward(keys(seed), {}, AT)

    def width(x: torch.Tensor) -> float:
        low, high = affine.value_range(affine.split(x, "channel", 128), -1)
        return (high - low).mean().item()

    assert width(reorder.forward(before, state, AT)) < 0.9 * width(before)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "merged"), [(4, 8, 4), (4, 6, 3), (4, 1, 1), (8, 5, 5), (2, 5, 1)]
)
def test_largest_divisor_of_the_heads(heads: int, kv_heads: int, merged: int) -> None:
    assert Hadamard(heads).shape((1, kv_heads, 7, 16)) == (1, kv_heads // merged, 7, 16 * merged)


def test_merged_heads_need_their_number_back() -> None:
    z = Hadamard(heads=2).forward(random(1, 4, 3, 8), {}, Site(0))
    with pytest.raises(KvpackError, match="kv heads"):
        Hadamard(heads=2).inverse(z, {}, Site(0))


def test_unrope_needs_a_rope() -> None:
    with pytest.raises(KvpackError, match="layer 2"):
        Unrope().forward(random(1, 1, 1, 8), {}, AT)


def test_reorder_refuses_broken_sums() -> None:
    with pytest.raises(KvpackError, match="not finite"):
        ChannelReorder().fit({"channel_sum": {"sum": torch.tensor([[1.0, torch.nan]])}})
    with pytest.raises(KvpackError, match="not measured"):
        ChannelReorder().fit({})
