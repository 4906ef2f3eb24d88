"""Lines over one axis, each number with its spread, as inline SVG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvpack.picture.labels import Box
from kvpack.picture.markup import Markup, join, shorten, tag
from kvpack.picture.scale import Scale, linear_scale, tick_text
from kvpack.picture.style import COLOURS, PLOT

WIDTH, HEIGHT = 860.0, 400.0
_LEFT, _RIGHT, _TITLE = 70.0, WIDTH - 20.0, 16.0
_WHISKER, _LEGEND = 4.0, 16.0
"""Half the width of a whisker's ends, and the height of a line of the legend, which stands above the plot."""
_PAINTS = ("--source", "--best", "--other", "--lost", "--soft")


@dataclass(frozen=True)
class Mark:
    """One number at `x`, with the ends of its spread."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Numbers of one name, in the order of x."""

    name: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Curves:
    """A plot: what is drawn, against what."""

    title: str
    across: str
    up: str
    curves: tuple[Curve, ...]


def curves_file(shown: Curves) -> str:
    """A stand-alone SVG file."""
    sizes: dict[str, object] = {"viewBox": f"0 0 {WIDTH:.0f} {HEIGHT:.0f}", "role": "img"}
    attributes = {"xmlns": "http://www.w3.org/2000/svg", **sizes, "width": WIDTH, "height": HEIGHT}
    back = tag("rect", {"width": WIDTH, "height": HEIGHT, "style": "fill: var(--back)"})
    style = tag("style", None, COLOURS, PLOT)
    return tag("svg", attributes, tag("title", None, shown.title), style, back, _panel(shown)) + "\n"


def curves_plot(shown: Curves) -> Markup:
    """The plot for an HTML page."""
    label = f"{shown.up} against {shown.across}; see the table"
    attributes: dict[str, object] = {"viewBox": f"0 0 {WIDTH:.0f} {HEIGHT:.0f}", "role": "img"}
    return tag("svg", {**attributes, "aria-label": label}, _panel(shown))


def _panel(shown: Curves) -> Markup:
    area = Box(_LEFT, _TITLE + _LEGEND * (len(shown.curves) + 1), _RIGHT, HEIGHT - 46.0)
    title = tag("text", {"class": "title", "x": _LEFT, "y": _TITLE}, shown.title)
    marks = [mark for curve in shown.curves for mark in curve.marks]
    if not marks:
        return join([title, tag("text", {"x": _LEFT, "y": 60, "class": "soft"}, "nothing to draw")])
    x = linear_scale([mark.x for mark in marks], area.left, area.right, from_zero=True)
    ends = [end for mark in marks for end in (mark.low, mark.high)]
    y = linear_scale(ends, area.bottom, area.top, from_zero=True)
    lines = [part for i, curve in enumerate(shown.curves) for part in _curve(curve, i, x, y)]
    return join([title, *_axes(shown, area, x, y), *lines])


def _axes(shown: Curves, area: Box, x: Scale, y: Scale) -> Iterable[Markup]:
    for value in y.ticks():
        at = y.at(value)
        yield _line("grid", (area.left, at), (area.right, at))
        yield _text(area.left - 8, at + 4, tick_text(value), "end")
    for value in x.ticks():
        at = x.at(value)
        yield _line("axis", (at, area.bottom), (at, area.bottom + 4))
        yield _text(at, area.bottom + 18, tick_text(value), "middle")
    yield _line("axis", (area.left, area.bottom), (area.right, area.bottom))
    yield _text((area.left + area.right) / 2, area.bottom + 36, shown.across, "middle")
    across = (area.top + area.bottom) / 2
    turned: dict[str, object] = {"transform": f"rotate(-90 14 {across:.0f})", "x": 14.0, "y": across}
    yield tag("text", {**turned, "text_anchor": "middle", "class": "soft"}, shown.up)


def _curve(curve: Curve, number: int, x: Scale, y: Scale) -> Iterator[Markup]:
    paint = _PAINTS[number % len(_PAINTS)]
    stroke = f"stroke: var({paint}); stroke-width: 1.8; fill: none"
    fill = f"fill: var({paint})"
    places = [(x.at(mark.x), y.at(mark.y)) for mark in curve.marks]
    for start, stop in pairwise(places):
        yield _line(None, start, stop, stroke)
    for (left, top), mark in zip(places, curve.marks, strict=True):
        yield from _whisker(left, y.at(mark.low), y.at(mark.high), stroke)
        hover = f"{curve.name}: {mark.y:.4g} at {mark.x:.6g} ({mark.low:.4g} to {mark.high:.4g})"
        circle = tag("circle", {"cx": left, "cy": top, "r": 3.5, "style": fill})
        yield tag("g", None, tag("title", None, hover), circle)
    at = _TITLE + _LEGEND * (number + 1.0)
    yield _line(None, (_LEFT, at - 4), (_LEFT + 24, at - 4), stroke)
    yield tag("text", {"x": _LEFT + 30, "y": at}, shorten(curve.name, 100))


def _whisker(left: float, low: float, high: float, style: str) -> Iterator[Markup]:
    yield _line(None, (left, low), (left, high), style)
    for end in (low, high):
        yield _line(None, (left - _WHISKER, end), (left + _WHISKER, end), style)


def _line(
    kind: str | None, start: Sequence[float], stop: Sequence[float], style: str | None = None
) -> Markup:
    places = {"x1": start[0], "y1": start[1], "x2": stop[0], "y2": stop[1]}
    return tag("line", {"class": kind, **places, "style": style})


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return tag("text", {"x": x, "y": y, "text_anchor": anchor, "class": "soft"}, text)
