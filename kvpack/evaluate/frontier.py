"""Several recipes on one text or task: who is on the frontier of bits and quality, and who fits a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpack.evaluate.scores import Evaluation, RecallEvaluation, Scores

AnyEvaluation = Evaluation | RecallEvaluation


@dataclass(frozen=True)
class Entry:
    """One recipe and what was found; `reason` says why nothing was, and is empty otherwise.

    `seconds` were spent on its export and scoring. `bug` tells a failure that is kvpack's fault.
    """

    recipe: str
    evaluation: AnyEvaluation | None = None
    reason: str = ""
    seconds: float = 0.0
    bug: bool = False


@dataclass(frozen=True)
class Point:
    """One recipe under one protocol: bits per element of its caches, and what that price buys.

    `metrics` are those of gates; `cost` is the one that decides, the less the better. A cost that is
    not a number is worse than everything.
    """

    recipe: str
    kv_bits: float
    metrics: Mapping[str, float]
    cost: float


@dataclass(frozen=True)
class Comparison:
    """Recipes beside one source, all from one run on the same text, or all asked the same.

    `source_bits` is the width of the source's numbers. `sinks` are the calibration's sink
    statistics, empty when it has none. `missing` are recipes that an interruption left out.
    """

    model: str
    entries: tuple[Entry, ...]
    source_bits: int
    budget_bits: float | None = None
    sinks: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def measured(self) -> list[AnyEvaluation]:
        """The evaluations there are."""
        return [entry.evaluation for entry in self.entries if entry.evaluation is not None]

    @property
    def source(self) -> Scores | float | None:
        """The source's own scores, or its share of right answers."""
        return next((found.source for found in self.measured), None)

    @property
    def protocols(self) -> list[str]:
        """Protocols that any recipe was measured under, ``weights`` excepted."""
        names = dict.fromkeys(name for found in self.measured for name in found.packed)
        return [name for name in names if name != "weights"]

    def points(self, protocol: str) -> list[Point]:
        """Recipes with a KV scheme under a protocol, and the bits that this protocol held."""
        return [
            _point(entry.recipe, entry.evaluation, protocol)
            for entry in self.entries
            if entry.evaluation is not None and protocol in entry.evaluation.kv_bits
        ]

    def frontier(self, protocol: str) -> list[Point]:
        """The points that no other beats in both bits and cost, fewest bits first."""
        points = self.points(protocol)
        chosen = pareto([(p.kv_bits, p.cost) for p in points])
        return sorted((points[i] for i in chosen), key=lambda p: p.kv_bits)

    def fits(self, point: Point) -> bool:
        """Whether a point keeps to the budget; False without one."""
        return self.budget_bits is not None and point.kv_bits <= self.budget_bits

    def best(self, protocol: str) -> Point | None:
        """The closest to the source among those within the budget, of equals the smaller."""
        able = [p for p in self.points(protocol) if self.fits(p) and math.isfinite(p.cost)]
        return min(able, key=lambda p: (p.cost, p.kv_bits), default=None)

    def ranked(self) -> list[Entry]:
        """Entries by bits of the first protocol, then cost; then those without a scheme, then failures."""
        first = next(iter(self.protocols), "")
        place = {p.recipe: (0, p.kv_bits, p.cost) for p in self.points(first)}

        def order(entry: Entry) -> tuple[int, float, float]:
            return place.get(entry.recipe, (2 if entry.evaluation is None else 1, 0.0, 0.0))

        return sorted(self.entries, key=order)


def _point(recipe: str, found: AnyEvaluation, protocol: str) -> Point:
    cost = found.cost(protocol)
    return Point(
        recipe, found.kv_bits[protocol], found.metrics(protocol), math.inf if math.isnan(cost) else cost
    )


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points (x, y) that no other beats: x and y at most as large, one of them smaller.

    Equal points stand or fall together; points with an infinite or undefined number are out.
    """
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    chosen: set[int] = set()
    best = math.inf
    for x in sorted({points[i][0] for i in finite}):
        column = [i for i in finite if points[i][0] == x]
        lowest = min(points[i][1] for i in column)
        if lowest < best:
            chosen |= {i for i in column if points[i][1] == lowest}
            best = lowest
    return chosen


def names_of(points: Iterable[Point]) -> set[str]:
    """The recipes of some points."""
    return {point.recipe for point in points}
