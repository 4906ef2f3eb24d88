"""How long work tells that it is alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Receives the state of a stage; called often, so it must be cheap."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` steps of `stage` are finished; `detail` says what is at hand."""


class _Silent:
    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Show nothing."""


SILENT: Progress = _Silent()
"""A `Progress` that shows nothing; the default everywhere."""


def counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """What to call with every few finished steps of a stage; tells `progress` that it has begun."""
    done = 0

    def tick(steps: int) -> None:
        nonlocal done
        done += steps
        progress(stage, done, total)

    tick(0)
    return tick
