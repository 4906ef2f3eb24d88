"""Several recipes on one text or task: who is on the frontier of bits and quality, and who fits a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvpack.evaluate.scores import Evaluation, RecallEvaluation, Scores

AnyEvaluation = Evaluation | RecallEvaluation
Axis = Literal["kv", "packed", "all"]


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
    """One recipe under one protocol: the stored bits of the comparison's axis, and what they buy.

    `metrics` are those of gates; `cost` is the one that decides, the less the better. A cost that is
    not a number is worse than everything.
    """

    recipe: str
    bits: float
    metrics: Mapping[str, float]
    cost: float


@dataclass(frozen=True)
class Comparison:
    """Recipes beside one source, all from one run on the same text, or all asked the same.

    `axis` tells which bits are compared: those of caches ("kv"), or of weights, of the packed layers
    ("packed") or of all parameters ("all"). `source_bits` is the width of the source's numbers. `sinks`
    are the calibration's sink statistics, empty when it has none. `missing` are recipes that an
    interruption left out.
    """

    model: str
    entries: tuple[Entry, ...]
    source_bits: int
    budget_bits: float | None = None
    sinks: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    axis: Axis = "kv"

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
        """Protocols that any recipe was measured under; ``weights`` where those are compared."""
        names = dict.fromkeys(name for found in self.measured for name in found.packed)
        return [name for name in names if (name == "weights") == (self.axis != "kv")]

    def points(self, protocol: str) -> list[Point]:
        """Recipes under a protocol, with the bits of the axis; those that leave it alone are left out."""
        found = ((e.recipe, e.evaluation, self.bits(e.evaluation, protocol)) for e in self.entries)
        return [
            _point(recipe, evaluation, protocol, bits)
            for recipe, evaluation, bits in found
            if evaluation is not None and bits is not None
        ]

    def bits(self, found: AnyEvaluation | None, protocol: str) -> float | None:
        """Stored bits of an evaluation on the axis; None where it has none."""
        if found is None or protocol not in found.packed:
            return None
        if self.axis == "kv":
            return found.kv_bits.get(protocol)
        if self.axis == "all":
            return found.bits_per_weight
        return found.packed_bits if isinstance(found, Evaluation) else None

    def frontier(self, protocol: str) -> list[Point]:
        """The points that no other beats in both bits and cost, fewest bits first."""
        points = self.points(protocol)
        chosen = pareto([(p.bits, p.cost) for p in points])
        return sorted((points[i] for i in chosen), key=lambda p: p.bits)

    def fits(self, point: Point) -> bool:
        """Whether a point keeps to the budget; False without one."""
        return self.budget_bits is not None and point.bits <= self.budget_bits

    def best(self, protocol: str) -> Point | None:
        """The closest to the source among those within the budget, of equals the smaller."""
        able = [p for p in self.points(protocol) if self.fits(p) and math.isfinite(p.cost)]
        return min(able, key=lambda p: (p.cost, p.bits), default=None)

    def ranked(self) -> list[Entry]:
        """Entries by bits of the first protocol, then cost; then those without a scheme, then failures."""
        first = next(iter(self.protocols), "")
        place = {p.recipe: (0, p.bits, p.cost) for p in self.points(first)}

        def order(entry: Entry) -> tuple[int, float, float]:
            return place.get(entry.recipe, (2 if entry.evaluation is None else 1, 0.0, 0.0))

        return sorted(self.entries, key=order)


def _point(recipe: str, found: AnyEvaluation, protocol: str, bits: float) -> Point:
    cost = found.cost(protocol)
    return Point(recipe, bits, found.metrics(protocol), math.inf if math.isnan(cost) else cost)


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
