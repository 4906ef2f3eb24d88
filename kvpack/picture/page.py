"""The report: one HTML file that needs nothing else and runs no foreign code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvpack import __version__
from kvpack.evaluate.cells import cells, headings, source_cells, subject, units
from kvpack.evaluate.frontier import AnyEvaluation, Axis, Comparison, Entry, names_of
from kvpack.evaluate.scores import Evaluation
from kvpack.evaluate.stored_errors import LayerError
from kvpack.picture.document import document, section
from kvpack.picture.heat import heat, sink_maps
from kvpack.picture.markup import Markup, escape, join, tag
from kvpack.picture.plot import headline, measures, plot

_LETTERS = {"prefill": "A", "decode": "B"}
_COUNTED: dict[Axis, str] = {
    "kv": "Bits count everything that the caches hold.",
    "packed": "Bits are those of the packed layers, scales and zeros counted.",
    "all": "Bits are those of all parameters, everything counted.",
}


def page(made: Comparison) -> str:
    """A comparison as an HTML document."""
    parts = [*_about(made), *_plots(made), *_table(made), *_errors(made)]
    sinks = sink_maps(made.sinks)
    if sinks:
        parts.append(section("Outlier channels and attention sinks", sinks))
    return document(headline(made), *parts)


def _about(made: Comparison) -> Iterator[Markup]:
    first = next(iter(made.measured), None)
    if first is not None:
        text = (
            f"{subject(first)}; all recipes and the source in one run of kvpack {__version__}. "
            f"{_COUNTED[made.axis]}"
        )
        yield tag("p", {"class": "soft"}, text)
    if made.missing:
        yield tag("p", {"class": "soft"}, f"Interrupted; not measured: {', '.join(made.missing)}.")


def _plots(made: Comparison) -> Iterator[Markup]:
    names = {
        "kl": "Divergence from the source against bits",
        "ppl": "Perplexity against bits",
        "recall": "Recall against bits",
    }
    for measure in measures(made):
        figures = [tag("figure", None, plot(made, name, measure)) for name in made.protocols]
        if figures:
            yield section(names[measure], *figures)
    if any(made.protocols):
        text = (
            f"Blue: on the frontier, no other recipe has both fewer bits and a {_better(made)}. "
            f"{'Hollow: the weights are packed, too.' if made.axis == 'kv' else ''}"
        )
        yield tag("p", {"class": "soft"}, text)


def _better(made: Comparison) -> str:
    return "higher recall" if "recall" in measures(made) else "smaller divergence; the source has KL 0"


def _table(made: Comparison) -> Iterator[Markup]:
    letters = [(name, _LETTERS.get(name, name)) for name in made.protocols or ["weights"]]
    first = next(iter(made.measured), None)
    names = [f"{letter} {what}" for _, letter in letters for what in ("bits", *headings(first))]
    columns = ["recipe", "weight bits", *names, "frontier", *(["budget"] if made.budget_bits else [])]
    head = tag("tr", None, *(tag("th", {"scope": "col"}, column) for column in columns))
    rows = [] if first is None or first.source is None else [_source_row(made, first, len(columns))]
    rows += [_row(made, entry, len(columns)) for entry in made.ranked()]
    told = "A: one forward, everything encoded. B: step by step, recent tokens exact. "
    caption = f"{told if made.axis == 'kv' else ''}{units(first)}."
    grid = tag(
        "table", None, tag("caption", None, caption), tag("thead", None, head), tag("tbody", None, *rows)
    )
    yield section("Numbers", tag("div", {"class": "scroll"}, grid))


def _cells(*texts: object) -> list[Markup]:
    return [tag("td", None, text) for text in texts]


def _source_row(made: Comparison, first: AnyEvaluation, columns: int) -> Markup:
    scores = source_cells(first)
    numbers = [x for _ in made.protocols or ["weights"] for x in (made.source_bits, *scores)]
    row = ["source", made.source_bits, *numbers]
    return tag("tr", None, *_cells(*row, *[""] * (columns - len(row))))


def _row(made: Comparison, entry: Entry, columns: int) -> Markup:
    number = made.entries.index(entry)
    if entry.evaluation is None:
        reason = tag("td", {"colspan": columns - 1, "class": "text"}, f"not measured: {entry.reason}")
        return tag("tr", {"class": "lost", "data_r": number}, *_cells(entry.recipe), reason)
    found = entry.evaluation
    on = [n for n in made.protocols if entry.recipe in names_of(made.frontier(n))]
    row = [entry.recipe, f"{found.bits_per_weight:.2f}"]
    for name in made.protocols or ["weights"]:
        bits = made.bits(found, name)
        row += ["" if bits is None else f"{bits:.2f}", *cells(found, name)]
    row.append(" ".join(_LETTERS.get(n, n) for n in on))
    if made.budget_bits:
        row.append(_budget(made, entry))
    return tag("tr", {"class": "best" if on else None, "data_r": number}, *_cells(*row))


def _budget(made: Comparison, entry: Entry) -> str:
    marks = []
    for name in made.protocols:
        best, letter = made.best(name), _LETTERS.get(name, name)
        if any(p.recipe == entry.recipe and made.fits(p) for p in made.points(name)):
            marks.append(f"{letter} (best)" if best and best.recipe == entry.recipe else letter)
    return ", ".join(marks)


def _errors(made: Comparison) -> Iterator[Markup]:
    """Per layer, how far keys and values as stored are from what the model computed."""
    found = [
        (entry.recipe, entry.evaluation.layer_errors)
        for entry in made.ranked()
        if isinstance(entry.evaluation, Evaluation) and entry.evaluation.layer_errors
    ]
    if not found:
        return
    figures = []
    for plane in ("key", "value"):
        rows = [(recipe, [getattr(x, plane) for x in errors]) for recipe, errors in found]
        caption = tag("figcaption", None, f"{plane}s")
        what = f"||{plane} - stored||/||{plane}||"
        figures.append(tag("figure", None, caption, heat(rows, column="layer", what=what)))
    about = tag(
        "p",
        {"class": "soft"},
        escape("Relative error of each layer, one column per layer, measured under A."),
    )
    numbers = tag("details", None, tag("summary", None, "as numbers"), *_error_table(found))
    yield section("Error per layer", about, *figures, numbers)


def _error_table(found: Sequence[tuple[str, Sequence[LayerError]]]) -> Iterator[Markup]:
    layers = max(len(errors) for _, errors in found)
    columns = ["recipe", "", *(str(i) for i in range(layers))]
    head = tag("tr", None, *(tag("th", {"scope": "col"}, c) for c in columns))
    rows = [
        tag(
            "tr",
            None,
            *_cells(recipe, plane, *(f"{getattr(x, plane):.3f}" for x in errors)),
        )
        for recipe, errors in found
        for plane in ("key", "value")
    ]
    yield tag(
        "div",
        {"class": "scroll"},
        tag("table", None, tag("thead", None, head), tag("tbody", None, join(rows))),
    )
