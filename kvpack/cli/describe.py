"""Parts and schemes in a few words."""

from __future__ import annotations

from kvpack.core.registry import kind_of
from kvpack.core.roles import Part
from kvpack.core.types import Group
from kvpack.recipe.build import settings
from kvpack.recipe.plan import PlanePlan


def describe(part: Part) -> str:
    """A part in a few words: ``affine bits 4, group channel/128, zero integer``.

    Whole numbers and groups are always shown, other settings where they differ from the default.
    """
    words = []
    for name, field in settings(type(part)).items():
        value = getattr(part, name)
        if isinstance(value, Part):
            words.append(f"{name} ({describe(value)})")
        elif isinstance(value, Group):
            words.append(f"{name} {value.axis}/{value.size}")
        elif type(value) is int or value != field.default:
            words.append(f"{name} {value}")
    return f"{kind_of(part)} {', '.join(words)}".rstrip()


def plane_text(plane: PlanePlan) -> str:
    """Transforms and codec of keys or values: ``unrope > hadamard heads 4 > affine bits 2``."""
    folded = " (folded)" if plane.folded else ""
    return " > ".join([*(describe(t) + folded for t in plane.transforms), describe(plane.codec)])
