"""One calibrated artifact with packed weights and a compressed cache, and copies to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvpack import pipeline
from tests.tiny_models import make_model

SMALL = ("calibration.samples=2", "calibration.sample_tokens=32", "calibration.batch=2")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("loading") / "source", "qwen2", dtype="bfloat16")


@pytest.fixture(scope="session")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loading") / "artifact"
    pipeline.export(pipeline.make_plan(source, "rotatekv-w4@4bit", SMALL), path)
    return path


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "artifact"))
