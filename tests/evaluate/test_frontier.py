"""Pareto frontiers and budgets, against the definition."""

from __future__ import annotations

import math
import random

import pytest

from kvpack.evaluate.frontier import Comparison, Entry, pareto
from kvpack.evaluate.scores import RecallEvaluation
from tests.picture.conftest import evaluation


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_is_what_nothing_dominates(seed: int) -> None:
    chosen = random.Random(seed)
    # Coarse numbers, so that ties and equal points are frequent.
    points = [(chosen.randint(1, 9) / 2, chosen.randint(1, 9) / 4) for _ in range(chosen.randint(0, 40))]
    expected = {i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)}
    assert pareto(points) == expected


def test_undefined_points_are_out() -> None:
    assert pareto([(1, math.nan), (math.nan, 1), (2, math.inf), (3, 0.5)]) == {3}
    assert pareto([]) == set()


def made(*rows: tuple[str, float, float | None], budget: float | None = None) -> Comparison:
    return Comparison("m", tuple(Entry(n, evaluation(b, kl)) for n, b, kl in rows), 16, budget)


def test_frontier_budget_and_best() -> None:
    found = made(("a", 2, 0.5), ("b", 3, 0.2), ("c", 4, 0.3), ("d", 5, 0.01), budget=4)
    assert [p.recipe for p in found.frontier("prefill")] == ["a", "b", "d"]
    assert [p.recipe for p in found.points("prefill") if found.fits(p)] == ["a", "b", "c"]
    assert found.best("prefill").recipe == "b"
    # Protocol B's own caches hold one bit more.
    assert [p.recipe for p in found.points("decode") if found.fits(p)] == ["a", "b"]
    assert found.best("decode").bits == 4


def test_without_a_budget_nothing_is_best() -> None:
    assert made(("a", 2, 0.5)).best("prefill") is None
    assert made(("a", 2, 0.5), budget=1.0).best("prefill") is None
    assert made(("a", 2, math.nan), budget=3.0).best("prefill") is None


def test_ranked_by_bits_then_divergence_with_failures_last() -> None:
    found = made(("b", 3, 0.5), ("c", 3, 0.2), ("a", 2, 0.9))
    lost = Entry("x", reason="no")
    found = Comparison("m", (lost, *found.entries), 16)
    assert [e.recipe for e in found.ranked()] == ["a", "c", "b", "x"]


def test_without_a_source_perplexity_decides() -> None:
    entries = (
        Entry("a", evaluation(2, None, ppl=9.0)),
        Entry("b", evaluation(3, None, ppl=8.0)),
        Entry("c", evaluation(4, None, ppl=8.5)),
    )
    found = Comparison("m", entries, 16)
    assert [p.recipe for p in found.frontier("decode")] == ["a", "b"]


def test_of_the_recall_task_wrong_answers_decide() -> None:
    def found(bits: float, share: float) -> RecallEvaluation:
        return RecallEvaluation(96, 4, 4, 3, 0, {"decode": share}, 16.0, 1.0, {"decode": bits})

    rows = {"a": found(2, 0.5), "b": found(3, 0.8), "c": found(4, 0.7), "d": found(5, 1.0)}
    made = Comparison("m", tuple(Entry(name, x) for name, x in rows.items()), 16, 4.5)
    assert [p.recipe for p in made.frontier("decode")] == ["a", "b", "d"]
    assert made.best("decode").recipe == "b"
    assert made.best("decode").metrics["recall_loss"] == pytest.approx(0.2)
    assert made.source == 1
