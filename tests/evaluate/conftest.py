"""One tiny source, KV recipes written as YAML, and their exports, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvpack import pipeline
from tests.tiny_models import make_model

IDENTITY = "{kind: identity}"
TEXT = "\n\n".join(
    f"Paragraph {i}: {word} " + f"and then {word[::-1]} again, {i * i} times over. " * 6
    for i, word in enumerate(("river", "copper", "lantern", "meadow", "harbour", "violin") * 5)
)


def affine(bits: int, axis: str, size: int = 8) -> str:
    return f"{{kind: affine, bits: {bits}, group: {{axis: {axis}, size: {size}}}, zero: float}}"


def kv_recipe(key: str, value: str, recent: int) -> str:
    """A recipe that leaves the weights alone."""
    return f"""kvpack: 1
name: test
kv_cache:
  tiers:
    recent: {{codec: {IDENTITY}}}
    old: {{key: {key}, value: {value}}}
  policy: {{kind: sink_recent, sink_tokens: 0, recent_tokens: {recent}, inside: recent, outside: old}}
"""


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("evaluate") / "source")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("evaluate") / "text.txt"
    path.write_text(TEXT)
    return str(path)


Packed = Callable[[str], Path]


@pytest.fixture(scope="session")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The artifact of `source` under a recipe's text or name; equal texts give the same folder."""
    root = tmp_path_factory.mktemp("artifacts")
    made: dict[str, Path] = {}

    def make(recipe: str) -> Path:
        if recipe not in made:
            name = recipe
            if recipe.startswith("kvpack:"):
                file = root / f"{len(made)}.yaml"
                file.write_text(recipe)
                name = str(file)
            made[recipe] = root / str(len(made))
            pipeline.export(pipeline.make_plan(source, name), made[recipe])
        return made[recipe]

    return make
