"""Heat rows: one row of cells per line of numbers, stronger where the number is larger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvpack.picture.markup import Markup, join, shorten, tag

WIDTH, _NAMES, _ROW, _GAP = 860.0, 190.0, 16.0, 2.0
_MOST_CELLS, _MOST_ROWS = 160, 96

Row = tuple[str, Sequence[float]]


def heat(rows: Sequence[Row], *, column: str, what: str, log: bool = True) -> Markup:
    """A map of named rows.

    Args:
        rows: names, and numbers of at least 0; longer rows are shown by the largest of neighbours.
        column: what the cells of a row stand for, "layer" for example.
        what: the quantity, for the legend and for screen readers.
        log: whether the shade follows the logarithm.
    """
    shown = [(name, _binned(numbers)) for name, numbers in rows[:_MOST_ROWS]]
    every = [x for _, numbers in shown for x in numbers if x > 0] or [1.0]
    low, high = min(every), max(every)
    longest = max((len(numbers) for _, numbers in shown), default=1)
    cell = min((WIDTH - _NAMES) / max(longest, 1), 48.0)
    body = [
        part
        for i, (name, numbers) in enumerate(shown)
        for part in _row(name, numbers, i * (_ROW + _GAP), cell, (low, high, log), column)
    ]
    height = len(shown) * (_ROW + _GAP) + 22
    left_out = "" if len(rows) <= _MOST_ROWS else f"; {len(rows) - _MOST_ROWS} more rows are not drawn"
    shade = "strong, logarithmic" if log else "strong"
    legend = f"{what}: from {low:.3g} (faint) to {high:.3g} ({shade}){left_out}"
    body.append(tag("text", {"x": 0, "y": height - 6, "class": "soft"}, legend))
    sizes: dict[str, object] = {"viewBox": f"0 0 {WIDTH:.0f} {height:.0f}", "role": "img"}
    return tag("svg", {**sizes, "aria-label": legend}, *body)


def _row(
    name: str,
    numbers: Sequence[float],
    top: float,
    cell: float,
    shade: tuple[float, float, bool],
    column: str,
) -> Iterator[Markup]:
    yield tag("text", {"x": 0, "y": top + 12}, shorten(name))
    for i, number in enumerate(numbers):
        hover = tag("title", None, f"{name}, {column} {i}: {number:.4g}")
        place: dict[str, object] = {
            "x": _NAMES + i * cell,
            "y": top,
            "width": max(cell - 1, 0.5),
            "height": _ROW,
        }
        yield tag("rect", {**place, "class": "cell", "fill_opacity": _opacity(number, *shade)}, hover)


def _opacity(number: float, low: float, high: float, log: bool) -> float:
    if number <= 0:
        return 0.04
    if high <= low:
        return 1.0
    share = math.log(number / low) / math.log(high / low) if log else (number - low) / (high - low)
    return 0.1 + 0.9 * min(max(share, 0.0), 1.0)


def _binned(numbers: Sequence[float]) -> list[float]:
    """At most `_MOST_CELLS` numbers, each the largest of its neighbours; NaN counts as 0."""
    clean = [x if math.isfinite(x) else 0.0 for x in numbers]
    size = math.ceil(len(clean) / _MOST_CELLS) or 1
    return [max(clean[i : i + size]) for i in range(0, len(clean), size)]


def sink_maps(sinks: Mapping[str, Any]) -> Markup:
    """Maps of a calibration's sink statistics; empty where it has none that can be read.

    Every key is optional: "sink_rate" (per head and position), "key_channel_max" (per head and
    channel), "hidden_norm" (per position), per layer.
    """
    layers = [x for x in _list(sinks.get("layers")) if isinstance(x, Mapping)]
    parts: list[Markup] = []
    for key, caption, column in (
        ("sink_rate", "attention that each position draws, per head", "position"),
        ("key_channel_max", "largest magnitude of key channels, per head", "channel"),
        ("hidden_norm", "norm of hidden states by position", "position"),
    ):
        rows = [row for index, layer in enumerate(layers) for row in _sink_rows(index, layer, key)]
        if rows:
            caption_tag = tag("figcaption", None, caption)
            parts.append(tag("figure", None, caption_tag, heat(rows, column=column, what=caption)))
    return join(parts)


def _sink_rows(index: int, layer: Mapping[str, Any], key: str) -> Iterator[Row]:
    name = f"layer {layer['layer'] if isinstance(layer.get('layer'), int) else index}"
    found = _list(layer.get(key))
    nested = [_numbers(row) for row in found if isinstance(row, list)]
    for head, numbers in enumerate(nested):
        if numbers:
            yield f"{name}, head {head}", numbers
    if not nested and (flat := _numbers(found)):
        yield name, flat


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(row: list[Any]) -> list[float]:
    return [float(x) for x in row if isinstance(x, (int, float)) and not isinstance(x, bool)]
