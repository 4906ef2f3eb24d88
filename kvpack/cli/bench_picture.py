"""A benchmark as a plot of step time against context, alone or on a page with its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpack.cli.bench_result import remarks, rows, subjects
from kvpack.picture.curves import Curve, Curves, Mark, curves_file, curves_plot
from kvpack.picture.document import document, section, table
from kvpack.picture.markup import tag

if TYPE_CHECKING:
    from kvpack.bench.columns import Column
    from kvpack.bench.result import Bench


def bench_plot(made: Bench) -> str:
    """The plot as an SVG file."""
    return curves_file(_curves(made))


def bench_page(made: Bench) -> str:
    """Plot and numbers as an HTML file."""
    headings, cells = rows(made)
    about = [tag("p", {"class": "soft"}, line) for line in subjects(made)]
    notes = [tag("p", {"class": "soft"}, line) for line in remarks(made)]
    caption = "Medians, with quartiles in brackets; a gain above 1 is better than the source."
    return document(
        f"Speed and memory of {_title(made)}",
        *about,
        section("Time of a decode step against context", tag("figure", None, curves_plot(_curves(made)))),
        section("Numbers", table(caption, headings, cells), *notes),
    )


def _title(made: Bench) -> str:
    return next((c.path.name for c in made.columns if c.name == "artifact"), "a model")


def _curves(made: Bench) -> Curves:
    title = f"Decode step, batch 1: {_title(made)}"
    lines = tuple(_curve(made, column) for column in made.columns)
    return Curves(title, "tokens in the cache", "ms per step, median and quartiles", lines)


def _curve(made: Bench, column: Column) -> Curve:
    marks = []
    for measure in made.measures:
        found = measure.spread(column.name)
        if measure.name == "step" and measure.context is not None and found is not None:
            marks.append(Mark(measure.context, found.median, found.low, found.high))
    told = made.described.get(column.name, {})
    return Curve(f"{column.name}: {told.get('dtype')}, {told.get('cache')}", tuple(marks))
