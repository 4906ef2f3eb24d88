from __future__ import annotations

import random

import pytest

from kvpack.picture.scale import linear_scale, log_scale, tick_text


@pytest.mark.parametrize("log", [False, True])
def test_ticks_lie_within_and_are_few(log: bool) -> None:
    chosen = random.Random(0)
    for _ in range(300):
        values = [10 ** chosen.uniform(-7, 4) for _ in range(chosen.randint(1, 5))]
        scale = (log_scale if log else linear_scale)(values, 354.0, 34.0)
        ticks = scale.ticks()
        assert 2 <= len(ticks) <= 13
        assert ticks == sorted(set(ticks))
        assert all(scale.low <= tick <= scale.high for tick in ticks)
        assert len({tick_text(tick) for tick in ticks}) == len(ticks)


def test_ends_map_to_ends_and_outside_is_clamped() -> None:
    scale = log_scale([0.001, 1.0], 100.0, 0.0)
    assert scale.at(scale.low) == 100
    assert scale.at(scale.high) == pytest.approx(0)
    assert scale.at(1e-9) == 100
    assert 0 < scale.at(1.0) < scale.at(0.001) < 100
    middle = (0.001 * 1.0) ** 0.5
    assert scale.at(middle) == pytest.approx(50)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (2.0, "2"), (0.05, "0.05"), (1e-5, "1e-5"), (2e6, "2e6"), (0.1 * 3, "0.3")]
)
def test_tick_texts(value: float, text: str) -> None:
    assert tick_text(value) == text
