"""The choice of layers that stay packed, against trying every set."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from kvpack.core.errors import UsageError
from kvpack.runtime.residency import Costs, LayerCost, Layers, spread, within_memory, within_time


def equal(count: int, compute: float, unpack: float, loss: float = 0.0) -> Costs:
    return Costs((LayerCost(compute, unpack, 100, 40),) * count, 0.5, 1000, loss)


def uneven(seed: int, count: int = 7) -> Costs:
    g = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, 4, generator=g).tolist()
    layers = (LayerCost(c, 2 * u, int(100 + 100 * r), int(60 + 30 * s)) for c, u, r, s in numbers)
    return Costs(tuple(layers), 0.3, 500, 0.4)


def by_hand(costs: Costs, packed: Layers) -> float:
    """Walk through one token: packed layers wait for what began as the last one was entered."""
    if len(packed) < 3:
        return costs.base_seconds
    total, since = costs.rest, 0.0
    # Start within the first packed layer, whose own wait belongs to the end of the walk.
    order = [(packed[0] + i) % len(costs.layers) for i in range(1, len(costs.layers) + 1)]
    since = costs.layers[packed[0]].compute
    total += costs.layers[packed[0]].compute
    for number in order:
        if number == 0:
            since += costs.rest
        if number in packed:
            unpack = costs.layers[number].unpack
            total += max(0.0, unpack - since) + costs.overlap_loss * min(unpack, since)
            since = 0.0
        if number != packed[0]:
            total += costs.layers[number].compute
            since += costs.layers[number].compute
    return total


def all_sets(costs: Costs) -> list[Layers]:
    return [s for n in range(len(costs.layers) + 1) for s in combinations(costs.packable, n)]


@pytest.mark.parametrize("seed", range(5))
def test_seconds_are_those_of_walking_through_the_layers(seed: int) -> None:
    costs = uneven(seed)
    for packed in all_sets(costs):
        assert costs.seconds(packed) == pytest.approx(by_hand(costs, packed))


def test_equal_layers_without_overlap_pack_the_share_of_the_formula() -> None:
    """Card, c: f = tau t_c / t_d without overlap; all of them where unpacking hides behind computing."""
    alone = equal(1000, 1.0, 0.2, loss=1.0)
    assert len(within_time(alone, 0.05)) == pytest.approx(1000 * 0.05 / 0.2, rel=0.01)
    assert len(within_time(equal(40, 1.0, 0.9), 0.0)) == 40
    assert within_time(equal(40, 1.0, 3.0, loss=1.0), 0.0) == ()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("slowdown", [0.0, 0.05, 0.3, 1.0])
def test_a_slow_down_is_kept_and_little_is_left_to_save(seed: int, slowdown: float) -> None:
    costs = uneven(seed)
    found = within_time(costs, slowdown)
    limit = (1 + slowdown) * costs.base_seconds
    assert costs.seconds(found) <= limit
    best = max(costs.saved_bytes(s) for s in all_sets(costs) if costs.seconds(s) <= limit)
    assert max(0, costs.saved_bytes(found)) >= 0.7 * best  # greedy; fitted to what was seen


@pytest.mark.parametrize("seed", range(8))
def test_memory_is_kept_at_little_more_than_the_least_time(seed: int) -> None:
    costs = uneven(seed)
    held = sorted({costs.held_bytes(s) for s in all_sets(costs)})
    for nbytes in (held[0] + 40, held[len(held) // 4]):
        try:
            found = within_memory(costs, nbytes)
        except UsageError:
            assert nbytes < costs.held_bytes(costs.packable)
            continue
        assert costs.held_bytes(found) <= nbytes
        best = min(costs.seconds(s) for s in all_sets(costs) if costs.held_bytes(s) <= nbytes)
        assert costs.seconds(found) <= 1.35 * best  # greedy; fitted to what was seen


def test_nothing_is_packed_where_it_need_not_be_and_the_impossible_is_refused() -> None:
    costs = equal(20, 1.0, 2.0)
    assert within_memory(costs, costs.held_bytes(())) == ()
    with pytest.raises(UsageError, match=f"{costs.held_bytes(costs.packable):,} bytes at least"):
        within_memory(costs, 100)
    with pytest.raises(UsageError, match=r"cannot be -0\.1"):
        within_time(costs, -0.1)
    few = equal(4, 1.0, 0.1)
    assert few.saved_bytes((0, 1, 2, 3)) == 4 * 60 - 200
    assert within_time(equal(3, 1.0, 0.1), 1.0) == ()  # two of three would be unpacked at all times


def test_layers_without_anything_packed_are_never_chosen() -> None:
    layers = tuple(LayerCost(1.0, 0.0 if i % 2 else 0.1, 100, 100 if i % 2 else 10) for i in range(20))
    assert set(within_time(Costs(layers), 1.0)) == set(range(0, 20, 2))


def test_sets_are_spread_evenly() -> None:
    assert spread(range(8), 0) == ()
    assert spread(range(8), 8) == tuple(range(8))
    assert spread(range(8), 2) == (2, 6)
    gaps = [b - a for a, b in zip(spread(range(30), 11), spread(range(30), 11)[1:], strict=False)]
    assert set(gaps) <= {2, 3}


def test_the_loss_of_overlapping_is_what_was_measured() -> None:
    costs = equal(10, 1.0, 0.5)
    for loss in (0.0, 0.3, 1.0):
        known = equal(10, 1.0, 0.5, loss)
        assert costs.with_measured(
            costs.packable, known.seconds(costs.packable)
        ).overlap_loss == pytest.approx(loss)
    assert costs.with_measured(costs.packable, 0.0).overlap_loss == 0.0
    assert costs.with_measured(costs.packable, 1e9).overlap_loss == 1.0
