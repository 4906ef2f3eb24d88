"""Real processes: their errors and their deaths arrive as errors that say what happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kvpack.bench.columns import Column
from kvpack.bench.process import Worker, started
from kvpack.core.errors import ArtifactError, KvpackError, ResourceError


def column(kind: str, path: Path) -> Column:
    return Column(kind, kind, path, 0, 0, 0)


def pid_of(worker: Worker) -> int:
    return worker._process.pid


def test_errors_keep_their_class_and_death_tells_its_last_words(tmp_path: Path) -> None:
    with started(column("artifact", tmp_path), 1, "auto", 0) as worker:
        assert worker.ready()["import_seconds"] > 0
        with pytest.raises(ArtifactError, match=r"artifact: .*holds no kvpack\.json") as caught:
            worker.ask("load")
        assert "kvpack export" in caught.value.hint
        with pytest.raises(KvpackError, match="measured artifact died with exit code 1") as died:
            worker.ask("steps", count=2)  # without a model
    assert died.value.hint.startswith("its last words:")
    assert "AttributeError" in died.value.hint
    with pytest.raises(ProcessLookupError):
        os.kill(pid_of(worker), 0)


def test_a_killed_process_is_probably_out_of_memory(tmp_path: Path) -> None:
    with started(column("source", tmp_path), 1, "auto", 0) as worker:
        os.kill(pid_of(worker), signal.SIGKILL)
        with pytest.raises(ResourceError, match="was killed"):
            worker.ready()


def test_an_error_ends_the_process(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), started(column("source", tmp_path), 1, "auto", 0) as worker:
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(pid_of(worker), 0)
