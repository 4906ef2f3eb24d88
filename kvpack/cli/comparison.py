"""A comparison of recipes as JSON data and as lines, for either task."""

from __future__ import annotations

from typing import Any

from kvpack.cli.console import table
from kvpack.evaluate.cells import cells, headings, source_cells, subject, units
from kvpack.evaluate.frontier import AnyEvaluation, Axis, Comparison, Entry, names_of
from kvpack.evaluate.scores import Evaluation, RecallEvaluation

LETTERS = {"prefill": "A", "decode": "B"}
"""Short names of the protocols, as the literature's tables have them."""


_LEGENDS: dict[Axis, str] = {
    "kv": "A: one forward, everything encoded; B: step by step, recent tokens exact",
    "packed": "bits: stored per weight of the packed layers, scales and zeros counted",
    "all": "bits: stored per parameter, everything counted",
}


def protocol_line(found: AnyEvaluation, protocol: str) -> str:
    """One protocol in a few words."""
    bits = f"{found.kv_bits[protocol]:.2f} bits, " if protocol in found.kv_bits else ""
    if isinstance(found, RecallEvaluation):
        return f"{protocol} {bits}recall {found.packed[protocol]:.1%}"
    scores = found.packed[protocol]
    kl = "" if scores.kl is None else f", KL {scores.kl:.5f}"
    return f"{protocol} {bits}ppl {scores.perplexity:.3f}{kl}"


def comparison_data(made: Comparison) -> dict[str, Any]:
    """A comparison as JSON data."""
    best = {name: point.recipe if (point := made.best(name)) else None for name in made.protocols}
    return {
        "model": made.model,
        **_subject(next(iter(made.measured))),
        "axis": made.axis,
        "source_bits": made.source_bits,
        "budget_bits": made.budget_bits,
        "frontier": {name: [p.recipe for p in made.frontier(name)] for name in made.protocols},
        "best": best if made.budget_bits is not None else None,
        "missing": list(made.missing),
        "recipes": [_entry_data(made, entry) for entry in made.ranked()],
    }


def _subject(first: AnyEvaluation) -> dict[str, Any]:
    """What all recipes were asked, and what the source answered."""
    if isinstance(first, Evaluation):
        text = {"text": first.text, "tokens": first.tokens, "context_tokens": first.context_tokens}
        return {"task": "text", **text, "source": first.source}
    return {
        "task": "recall",
        "tokens": first.tokens,
        "facts": first.facts,
        "questions": first.questions,
        "sequences": first.sequences,
        "seed": first.seed,
        "source": None if first.source is None else {"recall": first.source},
    }


def _entry_data(made: Comparison, entry: Entry) -> dict[str, Any]:
    found = entry.evaluation
    data: dict[str, Any] = {"recipe": entry.recipe, "reason": entry.reason or None, "seconds": entry.seconds}
    if found is None:
        return {**data, "packed": None}
    packed = {name: _metrics(found, name) for name in found.packed}
    if made.budget_bits is not None:
        for name, values in packed.items():
            bits = made.bits(found, name)
            values["fits"] = bits is not None and bits <= made.budget_bits
    data |= {"packed": packed, "bits_per_weight": found.bits_per_weight}
    if isinstance(found, RecallEvaluation):
        return data
    return {
        **data,
        "packed_bits": found.packed_bits,
        "step_tokens": found.step_tokens,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "layer_errors": found.layer_errors,
    }


def _metrics(found: AnyEvaluation, protocol: str) -> dict[str, Any]:
    """The gates' metrics, with the bits that this protocol's caches held."""
    metrics: dict[str, Any] = {**found.metrics(protocol)}
    return {**metrics, "kv_bits": found.kv_bits.get(protocol)}


def comparison_lines(made: Comparison) -> list[Any]:
    """A comparison for people: source, recipes by bits, what could not be measured, legend."""
    first, protocols = next(iter(made.measured)), made.protocols
    letters = {name: LETTERS.get(name, name) for name in protocols}
    numbers = [f"{letters[n]} {what}" for n in protocols for what in ("bits", *headings(first))]
    columns = ["recipe", "w bits", *numbers, "frontier", *(["budget"] if made.budget_bits else []), "s"]
    rows = [_row(made, entry) for entry in made.ranked() if entry.evaluation is not None]
    return [
        subject(first),
        table(columns, [_source_row(made), *rows], right=("w bits", *numbers, "s")),
        *(f"not measured: {e.recipe}: {e.reason}" for e in made.ranked() if e.evaluation is None),
        f"{_LEGENDS[made.axis]}; {units(first)}",
        *_best_lines(made, letters),
    ]


def _best_lines(made: Comparison, letters: dict[str, str]) -> list[str]:
    if made.budget_bits is None:
        return []
    lines = []
    for name, letter in letters.items():
        best = made.best(name)
        text = "none" if best is None else f"{best.recipe}, {best.bits:.2f} bits"
        lines.append(f"best within {made.budget_bits:g} bits, {letter}: {text}")
    return lines


def _source_row(made: Comparison) -> list[str]:
    scores = source_cells(next(iter(made.measured)))
    numbers = [x for _ in made.protocols for x in (f"{made.source_bits:.2f}", *scores)]
    return ["source", f"{made.source_bits:.2f}", *numbers, "", *([""] if made.budget_bits else []), ""]


def _row(made: Comparison, entry: Entry) -> list[str]:
    found = entry.evaluation
    if found is None:
        return [entry.recipe]
    numbers: list[str] = []
    for name in made.protocols:
        bits = made.bits(found, name)
        numbers += ["" if bits is None else f"{bits:.2f}", *cells(found, name)]
    on = [LETTERS.get(n, n) for n in made.protocols if entry.recipe in names_of(made.frontier(n))]
    row = [entry.recipe, f"{found.bits_per_weight:.2f}", *numbers, " ".join(on)]
    return [*row, *([_budget(made, entry)] if made.budget_bits else []), f"{entry.seconds:.1f}"]


def _budget(made: Comparison, entry: Entry) -> str:
    """The protocols whose budget a recipe keeps; a star where it is the best of them."""
    marks = []
    for name in made.protocols:
        if entry.recipe in names_of(p for p in made.points(name) if made.fits(p)):
            best = made.best(name)
            star = "*" if best is not None and best.recipe == entry.recipe else ""
            marks.append(LETTERS.get(name, name) + star)
    return " ".join(marks)
