"""Plain mappings to dataclasses and back, strictly: the type hints are the schema.

Every key must be a field, every value must have the field's type, and all mistakes are collected
before anything is reported. Truth values are not numbers; whole numbers are accepted for floats.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.registry import find, kind_of, kinds, singular
from kvpack.core.roles import ROLES, Part
from kvpack.recipe.yaml_lines import Node

INVALID: Any = object()
"""Stands for a value whose errors were recorded."""

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Resolved annotations of a class."""
    return typing.get_type_hints(cls)


@functools.cache
def settings(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Fields of a dataclass that a recipe can set, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


@functools.cache
def role_of(annotation: Any) -> str | None:
    """The role whose parts an annotation accepts: `Codec` -> "codecs"; None for other types."""
    if inspect.isclass(annotation) and issubclass(annotation, Part):
        return next((role for role, base in ROLES.items() if issubclass(annotation, base)), None)
    return None


@functools.cache
def optional(annotation: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); anything else -> (itself, False)."""
    if typing.get_origin(annotation) in {Union, types.UnionType}:
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(inner) == 1:
            return inner[0], True
    return annotation, False


@functools.cache
def _origin(annotation: Any) -> Any:
    return typing.get_origin(annotation)


def suggest(word: str, known: Sequence[str]) -> str:
    """` (did you mean 'bits'?)`, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def build(annotation: Any, node: Node, path: str, errors: list[RecipeError]) -> Any:
    """Make the value that `annotation` describes.

    Args:
        annotation: a type hint: scalar, Literal, Optional, tuple, Mapping, dataclass or role.
        node: the data, with the places it came from.
        path: dotted key path of the data, for messages; "" at the root.
        errors: problems are appended here.

    Returns:
        The value, or `INVALID` when anything below it was wrong.
    """
    return _Builder(errors).value(annotation, node, path, {})


def to_mapping(value: Any) -> Any:
    """Plain data that `build` turns back into `value`; fields that are None by default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": kind_of(value)} if isinstance(value, Part) else {}
        pairs = ((name, getattr(value, name), f) for name, f in settings(type(value)).items())
        absent = (None, dataclasses.MISSING)
        return kind | {n: to_mapping(v) for n, v, f in pairs if v is not None or f.default not in absent}
    if isinstance(value, Mapping):
        return {key: to_mapping(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_mapping(item) for item in value]
    return value


class _Builder:
    """One pass over a tree; `errors` collects what is wrong."""

    def __init__(self, errors: list[RecipeError]) -> None:
        self.errors = errors

    def wrong(self, node: Node, path: str, what: str, hint: str = "") -> Any:
        text = f"{path}: {what}" if path else what
        self.errors.append(RecipeError(text, where=str(node.at), hint=hint))
        return INVALID

    def value(self, annotation: Any, node: Node, path: str, limits: Mapping[str, Any]) -> Any:
        annotation, may_be_null = optional(annotation)
        if node.value is None and may_be_null:
            return None
        if role := role_of(annotation):
            return self.part(role, annotation, node, path)
        if dataclasses.is_dataclass(annotation):
            return self.record(typing.cast(type, annotation), node, path)
        return self.plain(annotation, node, path, limits)

    def plain(self, annotation: Any, node: Node, path: str, limits: Mapping[str, Any]) -> Any:
        origin = _origin(annotation)
        if origin is Literal:
            return self.choice(typing.get_args(annotation), node, path)
        if origin is tuple:
            return self.sequence(typing.get_args(annotation), node, path, limits)
        if origin is not None and issubclass(origin, Mapping):
            return self.mapping(typing.get_args(annotation)[1], node, path, limits)
        return self.scalar(annotation, node, path, limits)

    def scalar(self, expected: Any, node: Node, path: str, limits: Mapping[str, Any]) -> Any:
        value = node.value
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            hint = "put the value in quotes" if expected is str and type(value) in {int, float, bool} else ""
            return self.wrong(node, path, f"expected {_NAMES[expected]}, got {_show(node)}", hint)
        if expected is float and not math.isfinite(typing.cast(float, value)):
            return self.wrong(node, path, f"expected a finite number, got {value}")
        if "choices" in limits and value not in limits["choices"]:
            return self.choice(tuple(limits["choices"]), node, path)
        low, high = limits.get("minimum"), limits.get("maximum")
        if (low is not None and value < low) or (high is not None and value > high):
            return self.wrong(node, path, f"{value} is out of range, allowed: {_range(low, high)}")
        return value

    def choice(self, choices: tuple[Any, ...], node: Node, path: str) -> Any:
        for choice in choices:
            if type(choice) is type(node.value) and choice == node.value:
                return choice
        guess = suggest(node.value, [str(c) for c in choices]) if isinstance(node.value, str) else ""
        allowed = ", ".join(str(c) for c in choices)
        return self.wrong(node, path, f"{_show(node)} is not one of: {allowed}{guess}")

    def sequence(self, args: tuple[Any, ...], node: Node, path: str, limits: Mapping[str, Any]) -> Any:
        if not isinstance(node.value, tuple):
            return self.wrong(node, path, f"expected a list, got {_show(node)}")
        kinds_ = (args[0],) * len(node.value) if args[-1] is Ellipsis else args
        if len(kinds_) != len(node.value):
            return self.wrong(node, path, f"expected {len(kinds_)} entries, got {len(node.value)}")
        pairs = enumerate(zip(kinds_, node.value, strict=True))
        items = tuple(self.value(a, item, _join(path, str(i)), limits) for i, (a, item) in pairs)
        return INVALID if any(item is INVALID for item in items) else items

    def mapping(self, inner: Any, node: Node, path: str, limits: Mapping[str, Any]) -> Any:
        if not isinstance(node.value, dict):
            return self.wrong(node, path, f"expected a mapping, got {_show(node)}")
        built = {k: self.value(inner, n, _join(path, k), limits) for k, n in node.value.items()}
        return INVALID if any(item is INVALID for item in built.values()) else built

    def part(self, role: str, base: type[Part], node: Node, path: str) -> Any:
        if not isinstance(node.value, dict):
            hint = f"write {{kind: {node.value}}}" if node.value in kinds(role) else ""
            return self.wrong(node, path, f"expected a mapping with a `kind`, got {_show(node)}", hint)
        kind = node.value.get("kind")
        if kind is None or not isinstance(kind.value, str):
            known = ", ".join(kinds(role))
            return self.wrong(kind or node, _join(path, "kind"), f"missing; {role}: {known}")
        try:
            part = find(role, kind.value)
        except RecipeError as error:
            other = [singular(r) for r in ROLES if r != role and kind.value in kinds(r)]
            also = f"; there is a {other[0]} of that name" if other else ""
            return self.wrong(kind, _join(path, "kind"), error.what + also, error.hint)
        if not issubclass(part, base):
            return self.wrong(kind, _join(path, "kind"), f"{kind.value!r} is not a {base.__name__}")
        return self.record(part, node, path, skip="kind")

    def record(self, cls: type, node: Node, path: str, skip: str = "") -> Any:
        if not isinstance(node.value, dict):
            return self.wrong(node, path, f"expected a mapping, got {_show(node)}")
        fields, before = settings(cls), len(self.errors)
        values: dict[str, Any] = {}
        for key, item in node.value.items():
            if key == skip:
                continue
            if key in fields:
                values[key] = self.value(hints(cls)[key], item, _join(path, key), fields[key].metadata)
            else:
                self.unknown(key, item, path, [*fields, *([skip] if skip else [])])
        for name in [n for n, field in fields.items() if n not in node.value and _required(field)]:
            if optional(hints(cls)[name])[1]:
                values[name] = None
            else:
                self.wrong(node, _join(path, name), "missing")
        if len(self.errors) > before:
            return INVALID
        return self.construct(cls, values, node, path)

    def unknown(self, key: str, item: Node, path: str, known: Sequence[str]) -> None:
        guess = suggest(key, known) or f" (known: {', '.join(known)})"
        at = Node(None, item.key_at or item.at)
        self.wrong(at, _join(path, key), f"unknown key{guess}")

    def construct(self, cls: Callable[..., Any], values: dict[str, Any], node: Node, path: str) -> Any:
        try:
            return cls(**values)
        except KvpackError as error:
            return self.wrong(node, path, error.what, error.hint)
        except ValueError as error:
            return self.wrong(node, path, str(error))


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _range(low: Any, high: Any) -> str:
    if high is None:
        return f"{low} or more"
    return f"{high} or less" if low is None else f"{low} to {high}"


def _show(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, tuple):
        return "a list"
    return "nothing" if node.value is None else repr(node.value)
