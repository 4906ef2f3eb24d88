"""The JSON Schema of recipe files, generated from the same dataclasses as the loader.

Editors use it for completion and for marking mistakes. A file may leave to `extends` what it does
not say itself, so the schema requires only `kvpack`; `kvpack recipes validate` has the last word.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from kvpack.core.registry import find, kinds
from kvpack.recipe.build import hints, optional, role_of, settings
from kvpack.recipe.compose import SCHEMA_VERSION
from kvpack.recipe.recipe import Recipe, Tier

_SCALARS = {int: "integer", float: "number", bool: "boolean", str: "string"}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file."""
    schema = _Schema()
    top = schema.record(Recipe)
    reference = {"type": "string", "description": "Path or bundled name, with an optional @variant."}
    top["properties"] |= {
        "kvpack": {"const": SCHEMA_VERSION, "description": "Version of the recipe format."},
        "extends": {"anyOf": [reference, {"type": "array", "items": reference}]},
        "variants": {
            "type": "object",
            "description": "Name -> dotted key paths and the values they take.",
            "additionalProperties": {"type": "object"},
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "kvpack recipe",
        **top,
        "required": ["kvpack"],
        "$defs": dict(sorted(schema.definitions.items())),
    }


class _Schema:
    """Collects one definition per dataclass, role and part on the way."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}

    def of(self, annotation: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
        annotation, may_be_null = optional(annotation)
        if may_be_null:
            return {"anyOf": [self.of(annotation, limits), {"type": "null"}]}
        if role := role_of(annotation):
            return self.reference(role, lambda: self.role(role))
        if dataclasses.is_dataclass(annotation):
            cls = typing.cast(type, annotation)
            return self.reference(cls.__name__, lambda: self.record(cls))
        return self.plain(annotation, limits)

    def plain(self, annotation: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Literal:
            return {"enum": list(args)}
        if origin in {Union, types.UnionType}:
            return {"anyOf": [self.of(a, limits) for a in args]}
        if origin is tuple and args[-1] is Ellipsis:
            return {"type": "array", "items": self.of(args[0], limits)}
        if origin is tuple:
            items = [self.of(a, limits) for a in args]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        if origin is not None and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": self.of(args[1], limits)}
        found: dict[str, Any] = {"type": _SCALARS[annotation]}
        if "choices" in limits:
            found["enum"] = list(limits["choices"])
        return found | {name: limits[name] for name in ("minimum", "maximum") if name in limits}

    def reference(self, name: str, make: typing.Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self.definitions:
            self.definitions[name] = {}  # a part may hold parts of its own role
            self.definitions[name] = make()
        return {"$ref": f"#/$defs/{name}"}

    def record(self, cls: type) -> dict[str, Any]:
        properties = {}
        for name, field in settings(cls).items():
            properties[name] = self.of(hints(cls)[name], field.metadata)
            if isinstance(field.default, (str, int, float)):
                properties[name] = {**properties[name], "default": field.default}
        if cls is Tier:
            properties["codec"] = {**properties["key"], "description": "Stands for both sides."}
        return {
            "type": "object",
            "description": _summary(cls),
            "properties": properties,
            "additionalProperties": False,
        }

    def role(self, role: str) -> dict[str, Any]:
        """A mapping whose `kind` decides which other keys it may have."""
        known: dict[str, Any] = {"kind": {"enum": kinds(role)}}
        choices = []
        for kind in kinds(role):
            part = self.record(find(role, kind))
            part["properties"] = {"kind": {"const": kind}, **part["properties"]}
            self.definitions[f"{role}.{kind}"] = part
            known |= dict.fromkeys(part["properties"].keys() - {"kind"}, True)
            choices.append(
                {
                    "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                    "then": {"$ref": f"#/$defs/{role}.{kind}"},
                }
            )
        return {"type": "object", "properties": known, "additionalProperties": False, "allOf": choices}


def _summary(cls: type) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]
