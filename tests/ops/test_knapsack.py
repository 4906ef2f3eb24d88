"""The knapsack against every combination."""

from __future__ import annotations

import itertools
import random

import pytest

from kvpack.ops import knapsack


def least(sizes: list[list[int]], losses: list[list[float]], capacity: int) -> float | None:
    """Loss of the best of all combinations."""
    found = [
        sum(losses[i][c] for i, c in enumerate(way))
        for way in itertools.product(*(range(len(s)) for s in sizes))
        if sum(sizes[i][c] for i, c in enumerate(way)) <= capacity
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_as_good_as_every_combination(seed: int) -> None:
    chosen = random.Random(seed)
    items = [chosen.randint(1, 6) for _ in range(chosen.randint(1, 6))]
    sizes = [[chosen.randint(0, 60) for _ in range(n)] for n in items]
    # Coarse losses, so that equal ones are frequent.
    losses = [[chosen.randint(0, 8) / 4 for _ in range(n)] for n in items]
    capacity = chosen.randint(0, 200)
    found, expected = knapsack.choose(sizes, losses, capacity), least(sizes, losses, capacity)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert sum(sizes[i][c] for i, c in enumerate(found)) <= capacity
    assert sum(losses[i][c] for i, c in enumerate(found)) == expected


def test_thinned_states_still_fit_and_fill() -> None:
    chosen = random.Random(1)
    shapes = [chosen.choice([4096, 1024, 14336]) * 4096 + chosen.randint(0, 9) for _ in range(60)]
    sizes = [[n * bits // 8 + 3 * n // 128 for bits in (2, 3, 4, 6, 8)] for n in shapes]
    losses = [[(1 + chosen.random()) * 4.0**-bits for bits in (2, 3, 4, 6, 8)] for _ in shapes]
    capacity = sum(options[1] for options in sizes)
    few, many = (knapsack.choose(sizes, losses, capacity, states) for states in (256, 1 << 14))

    def total(way: list[int], of: list[list]) -> float:
        return sum(of[i][c] for i, c in enumerate(way))

    assert total(many, losses) <= total(few, losses) <= 1.02 * total(many, losses)
    for way in (few, many):
        assert 0.99 * capacity <= total(way, sizes) <= capacity


def test_no_items_and_no_room() -> None:
    assert knapsack.choose([], [], 0) == []
    assert knapsack.choose([[3]], [[1.0]], 3) == [0]
    assert knapsack.choose([[3], [1, 2]], [[1.0], [0.0, 0.0]], 3) is None
