"""Four mirrored levels against every division of the magnitudes, and where an even grid is worse."""

import pytest
import torch
from torch import Tensor

from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.mirrored_levels import MirroredLevels
from kvpack.parts.codecs.nm_sparse import NmSparse
from kvpack.parts.solvers.gptq import Gptq
from tests.contracts.discovery import random


def direct(group: Tensor) -> Tensor:
    """The best of all divisions into small and large magnitudes, tried one by one."""
    ordered = group.double().abs().sort().values
    best, levels = None, None
    for cut in range(1, len(ordered) + 1):
        small, large = ordered[:cut], ordered[cut:] if cut < len(ordered) else ordered
        error = (small - small.mean()).square().sum()
        error += (large - large.mean()).square().sum() if cut < len(ordered) else 0.0
        if best is None or error < best - 1e-12:
            best, levels = error, (small.mean(), large.mean())
    table = torch.stack((-levels[1], -levels[0], levels[0], levels[1]))
    return table[(group.double().unsqueeze(-1) - table).abs().argmin(-1)]


def decoded(codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x, {}), {}, torch.float32)


@pytest.mark.parametrize("channels", [48, 64, 80, 172])
@pytest.mark.parametrize("size", [16, 64, 0])
def test_levels_are_the_best_two_means(channels: int, size: int) -> None:
    x = random(5, channels, seed=2)
    expected = torch.stack([torch.cat([direct(g) for g in row.split(size or channels)]) for row in x])
    torch.testing.assert_close(decoded(MirroredLevels(size), x).double(), expected, rtol=2e-3, atol=2e-3)


def test_zeros_constants_lone_numbers_and_bfloat16() -> None:
    x = random(4, 65).bfloat16()
    x[0], x[1] = 0.0, -0.5
    found = decoded(MirroredLevels(64), x)
    assert torch.equal(found[:2].abs(), x[:2].float().abs())
    assert (found[1] == -0.5).all()
    torch.testing.assert_close(found[:, 64], x[:, 64].float(), rtol=1e-3, atol=0), "a group of one is exact"


@pytest.mark.parametrize("size", [32, 64, 128])
def test_pruned_weights_fit_better_than_an_even_grid(size: int) -> None:
    """Card (g) 8, at equal bytes."""
    weight = random(30, 256, seed=5)
    mirrored = NmSparse(MirroredLevels(size))
    even = NmSparse(Affine(bits=2, group=Group("channel", size)))
    assert mirrored.encode(weight, {}).nbytes == even.encode(weight, {}).nbytes
    ours, theirs = ((decoded(c, weight) - weight).square().mean() for c in (mirrored, even))
    assert ours < 0.9 * theirs


def test_gptq_can_use_them() -> None:
    x = random(400, 80, seed=6) @ random(80, 80, seed=7)
    weight, codec = random(20, 80, seed=3), MirroredLevels(32)
    payload = Gptq().solve(weight, codec, {"gram": {"gram": x.T @ x}}).payload

    def lost(p) -> float:
        return ((codec.decode(p, {}, torch.float32) - weight) @ x.T).square().sum().item()

    assert lost(payload) < 0.8 * lost(codec.encode(weight, {}))
