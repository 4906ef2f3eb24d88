"""Running the real command in a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import kvpack
from kvpack.cli import entry

SCHEMA = json.loads((Path(kvpack.__file__).parent / "cli" / "output.schema.json").read_text())


@dataclass(frozen=True)
class Run:
    """What a process left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The single JSON object on standard output, checked against the shipped schema."""
        envelope = json.loads(self.out)
        jsonschema.validate(envelope, SCHEMA)
        assert envelope["ok"] == (self.code == 0)
        return envelope


Kvpack = Callable[..., Run]


@pytest.fixture
def run_kvpack(tmp_path: Path) -> Kvpack:
    """Run `kvpack` with arguments, and the temporary directory for crash files."""

    def run(*arguments: str, code: str = "", **environment: str) -> Run:
        command = ["-c", code, *arguments] if code else ["-m", "kvpack", *arguments]
        root = str(Path(kvpack.__file__).parent.parent)
        env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": root, **environment}
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=env, check=False, timeout=120
        )
        return Run(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def call_kvpack(capfd: pytest.CaptureFixture[str]) -> Kvpack:
    """Run `kvpack` in this process: for commands that need torch, which takes seconds to import."""

    def call(*arguments: str) -> Run:
        capfd.readouterr()
        code = entry.run(arguments)
        captured = capfd.readouterr()
        return Run(code, captured.out, captured.err)

    return call


@pytest.fixture
def demo_model() -> str:
    """The model that ships with kvpack."""
    from kvpack.core.data_files import data_dir

    return str(data_dir("calibration") / "demo_model")


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of two layers."""
    from tests.tiny_models import make_model

    return str(make_model(tmp_path_factory.mktemp("cli") / "source"))


@pytest.fixture(scope="session")
def tiny_artifact(tiny_source: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The random model with a two-bit cache that encodes after 32 tokens."""
    from kvpack import pipeline

    path = tmp_path_factory.mktemp("cli") / "artifact"
    pipeline.export(pipeline.make_plan(tiny_source, "kivi", ["kv_cache.policy.recent_tokens=32"]), path)
    return str(path)


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with the vocabulary of the recall task."""
    from tests.evaluate.test_recall import word_tokenizer
    from tests.tiny_models import make_model

    path = make_model(tmp_path_factory.mktemp("recall") / "source", vocab_size=len(word_tokenizer()))
    word_tokenizer().save_pretrained(path)
    return str(path)
