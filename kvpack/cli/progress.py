"""Progress on standard error: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

from kvpack.core.memory import peak_memory_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_SECONDS = 10.0
"""Shortest time between two lines of one stage, first and last excepted."""


class Reporter:
    """A `kvpack.core.progress.Progress` that shows nothing; the others extend it."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Take note of the state of a stage."""

    def say(self, text: str) -> None:
        """Tell of something that is finished, while the rest goes on."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""


class Lines(Reporter):
    """Plain lines, rare enough for a CI log."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.started: dict[str, float] = {}
        self.printed: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print it."""
        self.console.print(text)

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Print the first and the last state of a stage, and one every `LINE_SECONDS`."""
        now = self.clock()
        start = self.started.setdefault(stage, now)
        due = now - self.printed.get(stage, -LINE_SECONDS) >= LINE_SECONDS or stage not in self.printed
        if not due and done < total:
            return
        self.printed[stage] = now
        left = f", {_clock((now - start) / done * (total - done))} left" if 0 < done < total else ""
        tail = f"  {detail}" if detail else ""
        memory = peak_memory_bytes() / 2**30
        self.console.print(f"{stage} {done}/{total}{left}, peak {memory:.2f} GiB{tail}")


class Bars(Reporter):
    """One live bar per stage: steps, time, time left, peak memory."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: RichProgress | None = None
        self.tasks: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        """Print it above the bars."""
        self.console.print(text)

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Move the bar of a stage."""
        bars = self.bars or self._open()
        if stage not in self.tasks:
            self.tasks[stage] = bars.add_task(stage, total=total, detail="", memory="")
        memory = f"{peak_memory_bytes() / 2**30:.2f} GiB"
        bars.update(self.tasks[stage], completed=done, total=total, detail=detail, memory=memory)

    def close(self) -> None:
        """Stop drawing; finished bars stay on screen."""
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def _open(self) -> RichProgress:
        from rich import progress as rich_progress

        self.bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("peak {task.fields[memory]}  {task.fields[detail]}"),
            console=self.console,
        )
        self.bars.start()
        return self.bars


def reporter(console: Console, quiet: bool = False) -> Reporter:
    """The reporter that suits the console."""
    if quiet:
        return Reporter()
    return Bars(console) if console.is_terminal else Lines(console)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"
