"""Parts and calibration text, wherever parts stand in a scheme: who needs it, and how much there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from kvpack.core.roles import Part
from kvpack.recipe.recipe import Recipe

Scheme = TypeVar("Scheme")


def needs_data(recipe: Recipe) -> bool:
    """Whether any part of a recipe asks for statistics, and so for calibration text."""
    if recipe.budget is not None and recipe.budget.open:
        return True
    return any(
        part.requires() for part in _parts((recipe.basis, recipe.weights, recipe.kv_cache, recipe.sparsity))
    )


def _parts(value: Any) -> Iterator[Part]:
    """Every part of a scheme; those inside of parts are spoken for by their holder."""
    if isinstance(value, Part):
        yield value
    elif isinstance(value, Mapping):
        yield from _parts(tuple(value.values()))
    elif isinstance(value, tuple):
        for held in value:
            yield from _parts(held)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _parts(tuple(getattr(value, f.name) for f in dataclasses.fields(value)))


def for_rows(scheme: Scheme, rows: int) -> Scheme:
    """`scheme` with every part replaced by its `Part.for_rows`, those inside of parts first.

    Args:
        scheme: a part, or records, mappings and lists of parts and other things.
        rows: tokens of calibration text.

    Raises:
        RecipeError: a part needs more text.
    """
    return _told(scheme, rows)  # type: ignore[no-any-return]  # of the type it was given


def _told(value: Any, rows: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _told(held, rows) for key, held in value.items()}
    if isinstance(value, tuple):
        return tuple(_told(held, rows) for held in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    before = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    after = {name: _told(held, rows) for name, held in before.items()}
    told = value if after == before else dataclasses.replace(value, **after)
    return told.for_rows(rows) if isinstance(told, Part) else told
