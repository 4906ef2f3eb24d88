"""A benchmark as JSON data and as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvpack.cli.console import table
from kvpack.report import human_bytes

if TYPE_CHECKING:
    from kvpack.bench.columns import Column
    from kvpack.bench.result import Bench, Measure, Spread

_DETAILS = ("first_prompt", "first_step", "kv_allocated")
"""Measures that stay out of the table; they are in the data."""


def bench_data(made: Bench) -> dict[str, Any]:
    """A benchmark as JSON data, with every single number."""
    return {
        "complete": made.complete,
        "settings": made.settings,
        "columns": [_column_data(made, column) for column in made.columns],
        "measures": [_measure_data(made, measure) for measure in made.measures],
        "filled": made.filled,
        "warm": made.warm,
        "machine": made.machine,
    }


def _column_data(made: Bench, column: Column) -> dict[str, Any]:
    told = made.described.get(column.name, {})
    names = ("architecture", "dtype", "attention", "cache", "weight_bytes", "threads", "kernels")
    return {"name": column.name, "path": column.path, **{name: told.get(name) for name in names}}


def _measure_data(made: Bench, measure: Measure) -> dict[str, Any]:
    names = [column.name for column in made.columns]
    return {
        "name": measure.name,
        "context": measure.context,
        "unit": measure.unit,
        "better": "more" if measure.rising else "less",
        "values": {name: measure.spread(name) for name in names},
        "gain": {name: measure.gain(name) for name in names},
        "rounds": measure.rounds,
    }


def number(value: float, unit: str) -> str:
    """A number in its unit, without it where the label says it."""
    if unit == "bytes":
        return human_bytes(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.01 else f"{value:.2g}"


def spread_text(found: Spread | None, unit: str) -> str:
    """``"149 (148-152)"``: the median, and the quartiles in brackets where there are several numbers."""
    if found is None:
        return "-"
    middle = number(found.median, unit)
    low, high = number(found.low, unit), number(found.high, unit)
    return middle if found.count == 1 or low == middle == high else f"{middle} ({low} to {high})"


def gain_text(found: Spread | None) -> str:
    """``"2.61x (2.55 to 2.70)"``."""
    if found is None:
        return ""
    spread = f" ({found.low:.2f} to {found.high:.2f})" if found.count > 1 else ""
    return f"{found.median:.2f}x{spread}"


def label(measure: Measure) -> str:
    """What was measured, and the unit."""
    return measure.label if measure.unit == "bytes" else f"{measure.label}, {measure.unit}"


def measure_line(measure: Measure, columns: Sequence[Column]) -> str:
    """One measure of all columns, as soon as it is known."""
    told = []
    for column in columns:
        gain = gain_text(measure.gain(column.name))
        text = f"{column.name} {spread_text(measure.spread(column.name), measure.unit)}"
        told.append(f"{text}, {gain}" if gain else text)
    return f"{label(measure)}: {'; '.join(told)}"


def rows(made: Bench) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table."""
    compared = {c.name for c in made.columns if any(m.gain(c.name) for m in made.measures)}
    headings = [""]
    for column in made.columns:
        headings += [column.name, *(["gain"] if column.name in compared else [])]
    cells = []
    for measure in made.measures:
        if measure.name not in _DETAILS:
            row = [label(measure)]
            for column in made.columns:
                row.append(spread_text(measure.spread(column.name), measure.unit))
                row += [gain_text(measure.gain(column.name))] if column.name in compared else []
            cells.append(row)
    return headings, cells


def bench_lines(made: Bench) -> list[Any]:
    """A benchmark for people."""
    headings, cells = rows(made)
    return [*subjects(made), table(headings, cells), *remarks(made)]


def subjects(made: Bench) -> list[str]:
    """A line per column: what ran."""
    lines = []
    for column in made.columns:
        told = made.described.get(column.name, {})
        lines.append(
            f"{column.name}: {told.get('architecture')} of {column.path.name}, {told.get('dtype')}, "
            f"{told.get('cache')}, {human_bytes(told.get('weight_bytes', 0))} of weights"
            f"{_kernels(column, told)}"
        )
    return lines


def _kernels(column: Column, told: Mapping[str, Any]) -> str:
    """Which kernels an artifact may use; the source uses torch's."""
    return f", {told.get('kernels')} kernels" if column.name == "artifact" else ""


def remarks(made: Bench) -> list[str]:
    """How the numbers came about, and on what."""
    machine, chosen = made.machine, made.settings
    threads = {told.get("threads") for told in made.described.values()}
    versions = ", ".join(f"{name} {text}" for name, text in machine.versions.items() if text)
    lines = [
        f"medians and quartiles of {chosen.repeat} rounds, {chosen.steps} steps each at every context; in "
        "each round every column had its turn",
        "gain: how many times faster or smaller than the source, by round; batch 1; "
        f"{' or '.join(str(n) for n in sorted(t for t in threads if t))} threads",
        f"{machine.processor}, {machine.cores} cores, {' '.join(machine.flags)}; {versions}",
    ]
    if made.random_contexts:
        contexts = ", ".join(f"{n:,}" for n in made.random_contexts)
        lines.insert(1, f"contexts of {contexts} tokens are random keys and values, not the model's")
    if machine.others is not None:
        lines.append(f"other programs took {machine.others:.0%} of the processors meanwhile")
    return lines
