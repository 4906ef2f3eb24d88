"""What every allocator promises."""

import pytest
import torch

from kvpack.calibrate.stats import accumulator
from kvpack.core.roles import Allocator
from kvpack.core.types import Group, Stats
from kvpack.parts.codecs.affine import Affine
from tests.contracts.discovery import parts, random

ALLOCATORS = parts("allocators")
ROWS, CHANNELS = 24, 72


def stats_of(allocator: Allocator, tokens: int = 300) -> Stats:
    """Statistics of correlated inputs, and of gradients of outputs."""
    streams = {
        "input": random(tokens, CHANNELS) @ random(CHANNELS, CHANNELS, seed=1) + 0.5,
        "output_gradient": random(tokens, ROWS, seed=2),
    }
    found = {}
    for stat in allocator.requires():
        statistic = accumulator(stat.kind)
        statistic.update(streams[stat.of][None, None])
        found[stat.name] = statistic.state()
    return found


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    codec = Affine(bits=bits, group=Group("channel", 32))
    return codec.decode(codec.encode(weight, {}), {}, torch.float32)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_what_is_exact_loses_nothing(allocator: Allocator) -> None:
    weight = random(ROWS, CHANNELS, seed=3)
    assert allocator.loss(weight, weight.clone(), stats_of(allocator)) == 0


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_more_bits_lose_less(allocator: Allocator) -> None:
    weight, stats = random(ROWS, CHANNELS, seed=3), stats_of(allocator)
    losses = [allocator.loss(weight, rounded(weight, bits), stats) for bits in (2, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    assert all(type(loss) is float and loss > 0 for loss in losses)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_nothing_is_changed_and_nothing_random(allocator: Allocator) -> None:
    weight, stats = random(ROWS, CHANNELS, seed=3), stats_of(allocator)
    near, before = rounded(weight, 3), weight.clone()
    kept = {name: {n: t.clone() for n, t in state.items()} for name, state in stats.items()}
    assert allocator.loss(weight, near, stats) == allocator.loss(weight, near, stats)
    assert torch.equal(weight, before)
    assert all(torch.equal(stats[name][n], t) for name, state in kept.items() for n, t in state.items())


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_zero_weights_and_dead_inputs(allocator: Allocator) -> None:
    zeros = torch.zeros(ROWS, CHANNELS)
    assert allocator.loss(zeros, zeros, stats_of(allocator)) == 0
    stats = {
        name: {n: t * 0 if n != "count" else t for n, t in s.items()}
        for name, s in stats_of(allocator).items()
    }
    weight = random(ROWS, CHANNELS, seed=3)
    assert allocator.loss(weight, rounded(weight, 2), stats) == 0
