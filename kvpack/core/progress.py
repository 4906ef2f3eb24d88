"""How long work tells that it is alive."""

from __future__ import annotations

import time
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


class Pace(Protocol):
    """Receives the state of work whose amount is known."""

    def __call__(self, done: int, amount: float, detail: str = "") -> None:
        """`done` steps are finished, and `amount` of what is counted; `detail` says what is at hand."""


def paced(
    progress: Progress, stage: str, total: int, unit: str, clock: Callable[[], float] = time.monotonic
) -> Pace:
    """A `Progress` of one stage, which begins now, that adds how fast the stage goes.

    Args:
        progress: is told.
        stage: its name.
        total: its steps.
        unit: what is counted, per second: "MB/s".
        clock: seconds.
    """
    start = clock()

    def tell(done: int, amount: float, detail: str = "") -> None:
        seconds = clock() - start
        pace = f"{amount / seconds:,.0f} {unit}" if amount and seconds > 0 else ""
        progress(stage, done, total, ", ".join(part for part in (detail, pace) if part))

    return tell


def counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """What to call with every few finished steps of a stage; tells `progress` that it has begun."""
    done = 0

    def tick(steps: int) -> None:
        nonlocal done
        done += steps
        progress(stage, done, total)

    tick(0)
    return tick
