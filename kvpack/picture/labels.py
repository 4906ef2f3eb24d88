"""Placing labels beside points so that no label covers another label or a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHARACTER, LINE = 6.8, 14.0
"""Width of a character and height of a line at 11 px, rather too large than too small."""
_RADIUS = 5.0
_DISTANCES = (8, 16, 26, 38, 52, 68, 86, 106, 128, 152, 178)
_DIRECTIONS = ((1, 0), (1, -0.7), (-1, 0), (-1, -0.7), (0, -1), (1, 0.7), (-1, 0.7), (0, 1))


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether two rectangles share more than an edge."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        """Whether this one lies within another."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


@dataclass(frozen=True)
class Label:
    """Where a label stands; `far` tells that a line should lead to its point."""

    box: Box
    far: bool


def place(
    points: Sequence[tuple[float, float]], texts: Sequence[str], area: Box, lines: Sequence[Box] = ()
) -> list[Label | None]:
    """A place for the label of every point, the nearest that is free.

    Args:
        points: pixels (x, y), in the order in which they may choose.
        texts: their labels.
        area: where labels may stand.
        lines: what they should not cross either, if there is another place.

    Returns:
        Per point its label, or None where `area` is too full for it.
    """
    taken = [Box(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in points]
    labels: list[Label | None] = []
    for (x, y), text in zip(points, texts, strict=True):
        free = [
            label
            for label in _candidates(x, y, CHARACTER * len(text))
            if label.box.inside(area) and not any(label.box.overlaps(box) for box in taken)
        ]
        clear = (label for label in free if not any(label.box.overlaps(line) for line in lines))
        chosen = next(clear, free[0] if free else None)
        labels.append(chosen)
        if chosen is not None:
            taken.append(chosen.box)
    return labels


def _candidates(x: float, y: float, width: float) -> Iterator[Label]:
    for distance in _DISTANCES:
        for across, down in _DIRECTIONS:
            # The nearest edge of the label touches a diamond around the point.
            left = x + across * distance - (width * (1 - across) / 2)
            top = y + down * distance - (LINE * (1 - down) / 2 if across == 0 else LINE / 2)
            yield Label(Box(left, top, left + width, top + LINE), distance > _DISTANCES[1])
