"""Quality against bits: one panel per protocol and measure, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import Literal

from kvpack.evaluate.frontier import Axis, Comparison, Point, names_of
from kvpack.evaluate.scores import RecallEvaluation, Scores
from kvpack.picture.labels import LINE, Box, Label, place
from kvpack.picture.markup import Markup, join, shorten, tag
from kvpack.picture.scale import Scale, linear_scale, log_scale, tick_text
from kvpack.picture.style import COLOURS, PLOT

Measure = Literal["kl", "ppl", "recall"]
WIDTH, HEIGHT = 860.0, 400.0
_AREA = Box(70.0, 40.0, WIDTH - 20.0, HEIGHT - 46.0)
SMALLEST_KL = 1e-7
"""Divergences below are rounding, and drawn as this."""
_HOPELESS = 100
"""Perplexities above this many times the smallest are all alike."""
TITLES: dict[str, str] = {
    "prefill": "protocol A: one forward, everything encoded",
    "decode": "protocol B: step by step, recent tokens exact",
    "weights": "weights: one plain forward",
}
_AXES: dict[Measure, str] = {
    "kl": "KL divergence to the source, nats",
    "ppl": "perplexity",
    "recall": "recall, share of right answers",
}
BITS: dict[Axis, str] = {
    "kv": "stored KV bits per element, everything counted",
    "packed": "stored bits per weight of the packed layers, scales and zeros counted",
    "all": "stored bits per parameter, everything counted",
}
_NAMES: dict[Measure, str] = {"kl": "KL", "ppl": "perplexity", "recall": "recall"}


@dataclass(frozen=True)
class _Dot:
    """A point of the plot in pixels."""

    point: Point
    x: float
    y: float
    best: bool
    open: bool


def measures(made: Comparison) -> list[Measure]:
    """What can be drawn: divergence only beside a source."""
    if any(isinstance(found, RecallEvaluation) for found in made.measured):
        return ["recall"]
    return ["kl", "ppl"] if made.source is not None else ["ppl"]


def headline(made: Comparison) -> str:
    """What is compared, and on which model: its folder's name, as pictures leave the machine."""
    model = PurePath(made.model).name or made.model
    return f"{'KV-cache' if made.axis == 'kv' else 'Weight'} recipes on {model}"


def plot_file(made: Comparison) -> str:
    """A stand-alone SVG file: divergence (perplexity without a source), or recall, under every protocol."""
    measure = measures(made)[0]
    panels = [
        tag("g", {"transform": f"translate(0 {HEIGHT * i:.0f})"}, _panel(made, protocol, measure))
        for i, protocol in enumerate(made.protocols)
    ]
    height = HEIGHT * max(len(panels), 1)
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH:.0f} {height:.0f}"}
    back = tag("rect", {"width": WIDTH, "height": height, "style": "fill: var(--back)"})
    style = tag("style", None, COLOURS, PLOT)
    title = tag("title", None, f"{headline(made)}: quality against bits")
    sizes: dict[str, object] = {"width": WIDTH, "height": height, "role": "img"}
    return tag("svg", {**attributes, **sizes}, title, style, back, *panels) + "\n"


def plot(made: Comparison, protocol: str, measure: Measure) -> Markup:
    """One panel for an HTML page."""
    label = f"{_AXES[measure]} against {BITS[made.axis]}, {TITLES.get(protocol, protocol)}; see the table"
    attributes: dict[str, object] = {"viewBox": f"0 0 {WIDTH:.0f} {HEIGHT:.0f}", "role": "img"}
    return tag("svg", {**attributes, "aria-label": label}, _panel(made, protocol, measure))


def _value(point: Point, measure: Measure) -> float:
    value = point.metrics[measure]
    return max(value, SMALLEST_KL) if measure == "kl" else value


def _source_value(made: Comparison, measure: Measure) -> float | None:
    """The height of the source's line; its divergence is 0, which a logarithm does not reach."""
    if measure == "kl" or made.source is None:
        return None
    return made.source.perplexity if isinstance(made.source, Scores) else made.source


def _panel(made: Comparison, protocol: str, measure: Measure) -> Markup:
    title = tag("text", {"class": "title", "x": _AREA.left, "y": 16}, TITLES.get(protocol, protocol))
    points = [p for p in made.points(protocol) if math.isfinite(_value(p, measure))]
    if not points:
        empty = tag("text", {"x": _AREA.left, "y": 60, "class": "soft"}, "nothing to draw")
        return join([title, empty])
    source = _source_value(made, measure)
    x, y = _scales(made, points, measure, source)
    best = names_of(made.frontier(protocol))
    found = [e for e in made.entries if made.axis == "kv" and e.evaluation is not None]
    packed = {e.recipe for e in found if _packs_weights(made, e.evaluation)}
    dots = [
        _Dot(p, x.at(p.bits), y.at(_value(p, measure)), p.recipe in best, p.recipe in packed) for p in points
    ]
    steps = [] if measure == "ppl" else _steps(dots)
    crossed = [*steps, *([] if source is None else [_rule(y.at(source))])]
    axes = _axes(x, y, measure, BITS[made.axis])
    lines = [*axes, *_budget(made, x), *_source(source, y), *map(_frontier, steps)]
    return join([title, *lines, *_dots(made, dots, measure, crossed)])


def _packs_weights(made: Comparison, found: object) -> bool:
    bits = getattr(found, "bits_per_weight", 0.0)
    return bool(bits < made.source_bits - 0.01)


def _scales(
    made: Comparison, points: list[Point], measure: Measure, source: float | None
) -> tuple[Scale, Scale]:
    bits = [p.bits for p in points]
    budget = [] if made.budget_bits is None else [made.budget_bits]
    x = linear_scale([*bits, *budget, 1.0], _AREA.left, _AREA.right, from_zero=True)
    values = [_value(p, measure) for p in points] + ([] if source is None else [source])
    if measure == "ppl":  # what is hopeless is drawn at the edge, and does not squeeze the rest
        values = [min(value, _HOPELESS * min(values)) for value in values]
    wide = measure == "kl" or (measure == "ppl" and max(values) > 3 * min(values))
    return x, (log_scale if wide else linear_scale)(values, _AREA.bottom, _AREA.top)


def _axes(x: Scale, y: Scale, measure: Measure, bits: str) -> Iterable[Markup]:
    for value in y.ticks():
        at = y.at(value)
        yield _line("grid", _AREA.left, at, _AREA.right, at)
        yield _text(_AREA.left - 8, at + 4, tick_text(value), "end", "soft")
    for value in x.ticks():
        at = x.at(value)
        yield _line("axis", at, _AREA.bottom, at, _AREA.bottom + 4)
        yield _text(at, _AREA.bottom + 18, tick_text(value), "middle", "soft")
    yield _line("axis", _AREA.left, _AREA.bottom, _AREA.right, _AREA.bottom)
    middle = (_AREA.left + _AREA.right) / 2
    yield _text(middle, _AREA.bottom + 36, bits, "middle", "soft")
    across = (_AREA.top + _AREA.bottom) / 2
    turned: dict[str, object] = {"transform": f"rotate(-90 14 {across:.0f})", "x": 14.0, "y": across}
    logarithmic = ", logarithmic" if y.log else ""
    yield tag("text", {**turned, "text_anchor": "middle", "class": "soft"}, _AXES[measure] + logarithmic)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return tag("line", {"class": kind, "x1": x1, "y1": y1, "x2": x2, "y2": y2})


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str | None = None) -> Markup:
    return tag("text", {"x": x, "y": y, "text_anchor": anchor, "class": kind}, text)


def _budget(made: Comparison, x: Scale) -> list[Markup]:
    if made.budget_bits is None:
        return []
    at = x.at(made.budget_bits)
    text = f"budget {made.budget_bits:g}"
    return [
        _line("budget", at, _AREA.top, at, _AREA.bottom),
        _text(at, _AREA.top - 4, text, "middle", "soft"),
    ]


def _source(value: float | None, y: Scale) -> list[Markup]:
    if value is None:
        return []
    at = y.at(value)
    label = _text(_AREA.right, _AREA.top - 4, f"line: the source, {value:.3f}", "end", "source-text")
    return [_line("source", _AREA.left, at, _AREA.right, at), label]


def _steps(dots: list[_Dot]) -> list[Box]:
    """Steps of the frontier: to do better than a point on it costs the bits of the next."""
    best = sorted((dot for dot in dots if dot.best), key=lambda dot: dot.x)
    across = [Box(a.x, a.y, b.x, a.y + 1) for a, b in pairwise(best)]
    along = [Box(b.x, min(a.y, b.y), b.x + 1, max(a.y, b.y)) for a, b in pairwise(best)]
    return [*across, *along]


def _frontier(step: Box) -> Markup:
    level = step.bottom - step.top == 1
    x2, y2 = (step.right, step.top) if level else (step.left, step.bottom)
    return _line("frontier", step.left, step.top, x2, y2)


def _rule(at: float) -> Box:
    """A line across the whole plot."""
    return Box(_AREA.left, at, _AREA.right, at + 1)


def _dots(made: Comparison, dots: list[_Dot], measure: Measure, lines: list[Box]) -> list[Markup]:
    # Those on the frontier choose first, so that their labels stand close to them.
    ordered = sorted(dots, key=lambda dot: (not dot.best, dot.x, dot.y))
    texts = [shorten(dot.point.recipe) for dot in ordered]
    labels = place([(dot.x, dot.y) for dot in ordered], texts, _AREA, lines)
    number = {entry.recipe: i for i, entry in enumerate(made.entries)}
    return [
        _dot(dot, number[dot.point.recipe], text, label, measure)
        for dot, text, label in zip(ordered, texts, labels, strict=True)
    ]


def _dot(dot: _Dot, number: int, text: str, label: Label | None, measure: Measure) -> Markup:
    kinds = ["point", *(["best"] if dot.best else []), *(["open"] if dot.open else [])]
    value = f"{_NAMES[measure]} {_value(dot.point, measure):.4g}"
    hover = f"{dot.point.recipe}: {dot.point.bits:.2f} bits, {value}"
    inner = [tag("title", None, hover), tag("circle", {"cx": dot.x, "cy": dot.y, "r": 4})]
    if label is not None:
        box = label.box
        if label.far:
            near = (min(max(dot.x, box.left), box.right), min(max(dot.y, box.top), box.bottom))
            inner.append(_line("lead", dot.x, dot.y, *near))
        inner.append(_text(box.left, box.top + LINE - 4, text))
    return tag("g", {"class": " ".join(kinds), "data_r": number}, *inner)
