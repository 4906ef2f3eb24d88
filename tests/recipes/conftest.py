"""Real exports of tiny models, made once per session and shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import kvpack
from kvpack import pipeline
from kvpack.artifact.reader import Artifact
from kvpack.recipe.plan import Plan
from tests.tiny_models import make_model

SMALL = ("calibration.samples=4", "calibration.sample_tokens=32", "calibration.batch=2")
"""Overrides that keep calibration to a blink."""


@dataclass(frozen=True)
class Made:
    """An export and what it was made from."""

    source: Path
    plan: Plan
    path: Path

    @property
    def artifact(self) -> Artifact:
        return Artifact.open(self.path)

    def load(self) -> PreTrainedModel:
        return kvpack.load(self.path)


NARROW = {
    "vector-sinks": ("kv_cache.tiers.old.codec.bits=3", "kv_cache.tiers.old.codec.sub_vectors=2"),
}
"""Overrides for recipes whose codebooks so little text cannot fill, or whose vectors do not fit."""

MakeSource = Callable[..., Path]
Make = Callable[..., Made]


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> MakeSource:
    """Folder of a tiny checkpoint; equal arguments give the same folder."""
    root, made = tmp_path_factory.mktemp("sources"), {}

    def make(family: str = "llama", **options: object) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = make_model(root / f"{len(made)}-{family}", family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, make_source: MakeSource) -> Make:
    """An artifact; equal arguments give the same one."""
    root, made = tmp_path_factory.mktemp("artifacts"), {}

    def export(
        recipe: str, family: str = "llama", *, shard_bytes: int = 4_000_000, **options: object
    ) -> Made:
        key = (recipe, family, shard_bytes, *sorted(options.items()))
        if key not in made:
            source = make_source(family, **options)
            plan = pipeline.make_plan(source, recipe, (*SMALL, *NARROW.get(recipe.partition("@")[0], ())))
            done = pipeline.export(plan, root / str(len(made)), shard_bytes=shard_bytes)
            made[key] = Made(source, plan, done.path)
        return made[key]

    return export


@pytest.fixture(scope="session")
def prompt() -> torch.Tensor:
    """One sequence, longer than every exact window of the bundled recipes and every sliding one."""
    return torch.randint(3, 256, (1, 203), generator=torch.Generator().manual_seed(1))
