"""The generated schema accepts what the loader accepts, and marks mistakes."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml

from kvpack.core.registry import kinds
from kvpack.recipe.json_schema import recipe_schema
from kvpack.recipe.locate import bundled

SCHEMA = recipe_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_schema_is_valid_and_plain_json() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize("name", list(bundled()))
def test_bundled_recipe_is_valid(name: str) -> None:
    VALIDATOR.validate(yaml.safe_load(bundled()[name].read_text()))


def test_every_part_is_described() -> None:
    assert {f"codecs.{kind}" for kind in kinds("codecs")} <= SCHEMA["$defs"].keys()


def _kivi(change: dict[str, Any]) -> dict[str, Any]:
    recipe = yaml.safe_load(bundled()["kivi"].read_text())
    for path, value in change.items():
        at = recipe
        *words, last = path.split(".")
        for word in words:
            at = at[word]
        at[last] = value
    return recipe


@pytest.mark.parametrize(
    "change",
    [
        {"kv_cach": {}},
        {"kvpack": 2},
        {"name": 3},
        {"kv_cache.policy.recent": 3},
        {"kv_cache.policy.recent_tokens": -1},
        {"kv_cache.policy.kind": "sink_recnt"},
        {"kv_cache.tiers.old.key.bits": 9},
        {"kv_cache.tiers.old.key.bits": 2.5},
        {"kv_cache.tiers.old.key.zero": "flaot"},
        {"kv_cache.tiers.old.key.group.axis": "layer"},
        {"kv_cache.tiers.recent.codec.bits": 3},
        {"weights": [{"match": "@q", "codec": {"kind": "affine", "bitz": 4}}]},
        {"fidelity.level": "perfect"},
    ],
)
def test_mistakes_are_marked(change: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(_kivi(change))


def test_a_partial_part_is_fine_in_a_file_that_extends() -> None:
    recipe = {"kvpack": 1, "extends": "kivi", "kv_cache": {"tiers": {"old": {"key": {"bits": 3}}}}}
    assert VALIDATOR.is_valid(recipe)
    recipe["kv_cache"]["tiers"]["old"]["key"]["bitz"] = 3  # type: ignore[index]  # nested literal
    assert not VALIDATOR.is_valid(recipe)
