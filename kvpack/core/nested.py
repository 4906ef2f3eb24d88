"""Tensors of a part that is held by another part: their names carry the field's name in front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Held = TypeVar("Held")


def prefixed(field: str, tensors: Mapping[str, Held]) -> dict[str, Held]:
    """`tensors` (or their specs) as the holder names them: "codes" -> "backbone.codes"."""
    return {f"{field}.{name}": tensor for name, tensor in tensors.items()}


def inside(field: str, tensors: Mapping[str, Held]) -> dict[str, Held]:
    """Those of the holder's tensors that belong to `field`, by the names of the part it holds."""
    start = f"{field}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
