"""The YAML reader: values, places, and what it refuses."""

from __future__ import annotations

import pytest

from kvpack.core.errors import RecipeError
from kvpack.recipe.yaml_lines import MAX_BYTES, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-7", -7),
        (".5", 0.5),
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("'8'", "8"),
        ("0x10", "0x10"),
        ("nan", "nan"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"a: {text}", "f").plain()["a"]
    assert found == value
    assert type(found) is type(value)


def test_places() -> None:
    root = parse("a:\n  b: [1, {c: 2}]\n", "f.yaml")
    b = root.value["a"].value["b"]
    assert str(b.key_at) == "f.yaml:2:3"
    assert str(b.value[1].value["c"].at) == "f.yaml:2:14"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3:1: the key 'a' appears twice (it was first set at f:1:1)"),
        ("1: a\n", "f:1:1: the key '1' is not text"),
        ("a: !!python/object/apply:os.system [ls]\n", "f:1:4: tag"),
        ("a: !!str 3\n", "f:1:4: tag"),
        ("a: 1\n---\nb: 2\n", "a second document"),
        ("a: [1\n", "not valid YAML"),
        ("a: *nothing\n", "undefined alias"),
        ("a: b: c\n", "f:1:5: not valid YAML"),
        ("", "the file is empty"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper"),
        ("[" * 100_000, "nested deeper"),
        ("a: &x [*x]\n", "too large after expanding"),
        ("#" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_refused(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "f")
    assert expected in caught.value.message


def test_anchor_bomb_is_refused_before_it_expands() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="too large after expanding"):
        parse("\n".join(lines), "f")


def test_anchors_work() -> None:
    assert parse("a: &x {b: 1}\nc: *x\n", "f").plain() == {"a": {"b": 1}, "c": {"b": 1}}


def test_numbers_too_long_to_be_meant_stay_text() -> None:
    for text in ("9" * 5000, "1e999"):
        assert parse(f"a: {text}", "f").plain()["a"] == text
