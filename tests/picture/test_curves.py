"""Lines with whiskers, as SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from kvpack.picture.curves import Curve, Curves, Mark, curves_file, curves_plot

SVG = "{http://www.w3.org/2000/svg}"


def shown(*curves: Curve) -> Curves:
    return Curves("Steps <now>", "tokens", "ms", curves)


def line(name: str, *heights: float) -> Curve:
    return Curve(name, tuple(Mark(1000.0 * i, y, y - 1, y + 1) for i, y in enumerate(heights, 1)))


def test_every_number_is_a_circle_and_higher_is_up() -> None:
    root = ET.fromstring(curves_file(shown(line("source", 10, 20, 40), line("art & craft", 5, 6))))
    circles = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter(f"{SVG}circle")]
    assert len(circles) == 5
    assert circles[0][0] < circles[1][0] < circles[2][0]
    assert circles[0][1] > circles[1][1] > circles[2][1]
    assert circles[3][0] == circles[0][0]
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"Steps <now>", "tokens", "ms", "source", "art & craft"} <= set(texts)
    hovers = [t.text for t in root.iter(f"{SVG}title")]
    assert "source: 10 at 1000 (9 to 11)" in hovers


def test_one_point_and_no_point() -> None:
    assert "<circle" in curves_plot(shown(line("source", 3)))
    assert "nothing to draw" in curves_plot(shown(Curve("source", ())))
