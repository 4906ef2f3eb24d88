"""The other end of a worker: starting it, asking it, and telling why it died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TypeAlias

from kvpack.bench.columns import Column
from kvpack.core.errors import (
    ArtifactError,
    KvpackError,
    ResourceError,
    SourceError,
    UnsupportedModel,
    UsageError,
)

_KINDS = {k.code: k for k in (ArtifactError, ResourceError, SourceError, UnsupportedModel, UsageError)}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LINES = 12
_PATIENCE_SECONDS = 10

Process: TypeAlias = "subprocess.Popen[str]"


@contextmanager
def started(column: Column, threads: int | None, dtype: str, seed: int) -> Iterator[Worker]:
    """A worker that begins to import libraries at once, ended afterwards, and at once after an error.

    Args:
        column: what it is to measure.
        threads: of its computation; torch's own choice when None.
        dtype: of its computation, "auto" for the model's own.
        seed: of tokens, keys and values.
    """
    # A file for its errors, as a pipe that nobody reads would stop it.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        worker = Worker(column, _process(file, threads), file)
        try:
            worker.begin(threads=threads, dtype=dtype, seed=seed)
            yield worker
        except BaseException:
            worker.kill()
            raise
        finally:
            worker.close()


def _process(file: IO[str], threads: int | None) -> Process:
    numbers = {} if threads is None else dict.fromkeys(_THREADS, str(threads))
    return subprocess.Popen(
        [sys.executable, "-m", "kvpack.bench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=file,
        env={**os.environ, **numbers},
        encoding="utf-8",
    )


class Worker:
    """One process with one model; asked after `ready` has returned."""

    def __init__(self, column: Column, process: Process, file: IO[str]) -> None:
        self.column, self._process, self._errors = column, process, file

    def begin(self, **settings: Any) -> None:
        """Tell the process what it is to hold."""
        column = self.column
        self._tell(
            kind=column.kind, path=str(column.path), trust_remote_code=column.trust_remote_code, **settings
        )

    def ready(self) -> dict[str, Any]:
        """Wait until libraries are imported; the answer says how long that took."""
        return self._heard()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have something measured.

        Raises:
            ResourceError: the process was killed, probably for its memory.
            KvpackError: it failed, with the class of its own error, or died, with its last words.
        """
        self._tell(do=do, **arguments)
        return self._heard()

    def close(self) -> None:
        """Let the process end, and end it if it does not."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()
        self._process.wait()

    def _tell(self, **request: Any) -> None:
        if self._process.stdin is None:
            raise KvpackError("a worker was started without a standard input")
        with suppress(OSError):  # a dead process is noticed by its missing answer
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _heard(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line.endswith("\n"):
            raise self._death()
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            kind = _KINDS.get(found["error"], KvpackError)
            raise kind(f"{self.column.name}: {found['message']}", hint=found["hint"])
        return found

    def _death(self) -> KvpackError:
        """What is known of a process that has ended, or will, in the middle of something."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_SECONDS)
        code = self._process.poll()
        if code is not None and -code == getattr(signal, "SIGKILL", None):
            return ResourceError(
                f"the process that measured {self.column.name} was killed",
                why="usually because memory ran out",
                hint="use a smaller model or context, or close other programs",
            )
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines()[-_LINES:]
        return KvpackError(
            f"the process that measured {self.column.name} died with exit code {code}",
            where=str(self.column.path),
            hint="\n".join(["its last words:", *words]) if words else "it said nothing",
        )
