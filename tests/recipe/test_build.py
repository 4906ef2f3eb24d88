"""The strict builder: types, limits, nested parts, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import pytest

from kvpack.core.errors import RecipeError
from kvpack.core.registry import find, kinds
from kvpack.core.roles import ROLES
from kvpack.recipe.build import INVALID, build, to_mapping
from kvpack.recipe.yaml_lines import Node, Position


@dataclass(frozen=True)
class Inner:
    """A nested record."""

    size: int = 1


@dataclass(frozen=True)
class Outer:
    """One field of every type that a recipe may use."""

    whole: int
    real: float = 0.5
    flag: bool = False
    text: str = "t"
    maybe: int | None = None
    word: Literal["a", "b"] = "a"
    many: tuple[int, ...] = field(default=(), metadata={"minimum": 2})
    pair: tuple[int, str] = (1, "x")
    table: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = Inner()
    choice: str = field(default="p", metadata={"choices": ("p", "q")})


def make(data: Any) -> tuple[Any, list[str]]:
    errors: list[RecipeError] = []
    value = build(Outer, Node.of(data, Position("f")), "", errors)
    return value, [e.message for e in errors]


def test_everything_at_once() -> None:
    data = {
        "whole": 3, "real": 2, "flag": True, "text": "x", "maybe": 4, "word": "b", "many": [2, 3],
        "pair": [5, "y"], "table": {"k": 1}, "inner": {"size": 7}, "choice": "q",
    }  # fmt: skip
    value, errors = make(data)
    assert errors == []
    assert value == Outer(3, 2.0, True, "x", 4, "b", (2, 3), (5, "y"), {"k": 1.0}, Inner(7), "q")
    assert type(value.real) is float
    assert to_mapping(value) == data


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"whole": True}, "f: whole: expected a whole number, got True"),
        ({"whole": 1.0}, "expected a whole number, got 1.0"),
        ({"whole": None}, "expected a whole number, got nothing"),
        ({"real": False}, "expected a number, got False"),
        ({"real": float("nan")}, "expected a finite number"),
        ({"flag": 1}, "expected true or false, got 1"),
        ({"maybe": "1"}, "expected a whole number, got '1'"),
        ({"word": "c"}, "'c' is not one of: a, b"),
        ({"many": [2, 1]}, "f: many.1: 1 is out of range, allowed: 2 or more"),
        ({"many": 2}, "expected a list, got 2"),
        ({"pair": [1]}, "expected 2 entries, got 1"),
        ({"table": [1]}, "expected a mapping, got a list"),
        ({"table": {"k": "v"}}, "f: table.k: expected a number"),
        ({"inner": {"sise": 1}}, "f: inner.sise: unknown key (did you mean 'size'?)"),
        ({"choice": "z"}, "'z' is not one of: p, q"),
    ],
)
def test_wrong_types(change: dict[str, Any], expected: str) -> None:
    value, errors = make({"whole": 1, **change})
    assert value is INVALID
    assert len(errors) == 1
    assert expected in errors[0]


def test_missing_and_unknown_keys_come_together() -> None:
    _, errors = make({"hole": 1, "flag": 2})
    assert [e.split(": ")[1] for e in errors] == ["hole", "flag", "whole"]


@dataclass(frozen=True)
class Nullable:
    """Optional fields with every kind of default."""

    bare: int | None
    null: int | None = None
    one: int | None = 1


@pytest.mark.parametrize("value", [Nullable(None), Nullable(None, 2, None), Nullable(3, None, 4)])
def test_null_survives_the_round_trip(value: Nullable) -> None:
    errors: list[RecipeError] = []
    assert build(Nullable, Node.of(to_mapping(value), Position("f")), "", errors) == value
    assert errors == []


@pytest.mark.parametrize("role", ["codecs", "transforms", "policies", "solvers"])
def test_every_part_with_defaults_survives_the_round_trip(role: str) -> None:
    assert kinds(role)
    for kind in kinds(role):
        if any(f.default is MISSING and f.default_factory is MISSING for f in fields(find(role, kind))):
            continue  # it has settings without a default
        part = find(role, kind)()
        mapping = to_mapping(part)
        assert mapping["kind"] == kind
        errors: list[RecipeError] = []
        assert build(ROLES[role], Node.of(mapping, Position("f")), "", errors) == part
        assert errors == []


def test_contradictions_that_a_part_refuses_are_located() -> None:
    errors: list[RecipeError] = []
    node = Node.of({"kind": "affine", "bits": 1, "zero": "none"}, Position("f"))
    from kvpack.core.roles import Codec

    assert build(Codec, node, "here", errors) is INVALID
    assert errors[0].message.startswith("f: here: ")
