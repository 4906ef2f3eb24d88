"""One synthetic pair for all tests of the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpack import pipeline
from kvpack.bench.shapes import shape_of
from kvpack.bench.synthetic import synthesise


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shape with one layer."""
    return synthesise(shape_of("tiny", 1), tmp_path_factory.mktemp("bench") / "source")


@pytest.fixture(scope="session")
def tiny_packed(tiny_model: Path) -> Path:
    """The same with a two-bit cache that encodes after 32 tokens."""
    path = tiny_model.with_name("artifact")
    pipeline.export(pipeline.make_plan(tiny_model, "kivi", ["kv_cache.policy.recent_tokens=32"]), path)
    return path
