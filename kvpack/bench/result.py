"""What a benchmark found: numbers by column and round, their spread, and how columns compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpack.bench.columns import SOURCE, Column
from kvpack.bench.machine import Machine
from kvpack.bench.settings import Settings

Rounds = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Spread:
    """Numbers in short: their median, quartiles (of fewer than four the extremes), mean and count."""

    median: float
    low: float
    high: float
    mean: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one number."""
        ordered = sorted(values)
        low, high = ordered[0], ordered[-1]
        if len(ordered) >= 4:
            low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(statistics.median(ordered), low, high, statistics.fmean(ordered), len(ordered))


@dataclass(frozen=True)
class Measure:
    """One quantity of all columns.

    Attributes:
        name: of the quantity, for data.
        label: the same for people.
        unit: of its numbers: "s", "ms", "tokens/s" or "bytes".
        rounds: by column, per round what was measured in that column's turn.
        context: tokens in the cache, None where it does not matter.
        rising: whether more is better.
        compared: whether gains over the source say anything.
    """

    name: str
    label: str
    unit: str
    rounds: Mapping[str, Rounds]
    context: int | None = None
    rising: bool = False
    compared: bool = True

    def values(self, column: str) -> tuple[float, ...]:
        """All numbers of a column."""
        return tuple(value for turn in self.rounds.get(column, ()) for value in turn)

    def spread(self, column: str) -> Spread | None:
        """The column in short, None where nothing could be measured."""
        values = self.values(column)
        return Spread.of(values) if values else None

    def gain(self, column: str) -> Spread | None:
        """How many times better than the source a column is, from medians of the same rounds.

        Above 1 is better: faster, or smaller. None for the source itself, and without one.
        """
        pairs = list(zip(self.rounds.get(SOURCE, ()), self.rounds.get(column, ()), strict=False))
        if column == SOURCE or not self.compared or not pairs:
            return None
        ratios = [_ratio(statistics.median(a), statistics.median(b)) for a, b in pairs if a and b]
        ratios = [1 / r if self.rising else r for r in ratios if r > 0 and math.isfinite(r)]
        return Spread.of(ratios) if ratios else None


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.inf


@dataclass(frozen=True)
class Bench:
    """A whole run.

    `described` holds per column what its worker said of its model; `filled` per context and column how
    the cache was filled. `complete` is False after an interruption. `warm` are columns whose files could not
    be dropped from memory although that was asked for.
    """

    columns: tuple[Column, ...]
    settings: Settings
    measures: tuple[Measure, ...]
    described: Mapping[str, Mapping[str, Any]]
    filled: Mapping[int, Mapping[str, str]]
    machine: Machine
    complete: bool = True
    warm: tuple[str, ...] = ()

    @property
    def random_contexts(self) -> list[int]:
        """Contexts of random keys and values, in whatever column."""
        return [context for context, how in self.filled.items() if "random" in how.values()]
