from __future__ import annotations

import itertools
import random

import pytest

from kvpack.picture.labels import CHARACTER, LINE, Box, place

AREA = Box(70, 34, 840, 354)


@pytest.mark.parametrize("seed", range(5))
def test_thirty_labels_touch_neither_each_other_nor_a_point(seed: int) -> None:
    chosen = random.Random(seed)
    points = [(chosen.uniform(70, 840), chosen.uniform(34, 354)) for _ in range(30)]
    texts = ["x" * chosen.randint(3, 20) for _ in points]
    labels = place(points, texts, AREA)
    assert all(labels), "there is room for thirty"
    for a, b in itertools.combinations(labels, 2):
        assert not a.box.overlaps(b.box)
    for label, text in zip(labels, texts, strict=True):
        assert label.box.inside(AREA)
        assert label.box.right - label.box.left == pytest.approx(CHARACTER * len(text))
        assert label.box.bottom - label.box.top == pytest.approx(LINE)
        for x, y in points:
            assert not label.box.overlaps(Box(x - 4, y - 4, x + 4, y + 4))


def test_a_lonely_label_stands_right_beside_its_point() -> None:
    (label,) = place([(300, 200)], ["kivi"], AREA)
    assert not label.far
    assert 0 < label.box.left - 300 < 12
    assert label.box.top < 200 < label.box.bottom


def test_lines_are_crossed_only_where_there_is_no_other_place() -> None:
    line = Box(70, 200, 840, 201)
    (label,) = place([(300, 200)], ["kivi"], AREA, [line])
    assert not label.box.overlaps(line)
    assert not label.far
    (label,) = place([(300, 200)], ["kivi"], AREA, [AREA])
    assert label.box.left > 300


def test_what_does_not_fit_is_left_out() -> None:
    labels = place([(100, 100)] * 400, ["a rather long name"] * 400, AREA)
    assert None in labels
    for a, b in itertools.combinations(filter(None, labels), 2):
        assert not a.box.overlaps(b.box)


def test_points_at_one_place_lead_to_their_labels() -> None:
    labels = place([(300, 200)] * 12, ["recipe"] * 12, AREA)
    assert all(labels)
    assert any(label.far for label in labels)
