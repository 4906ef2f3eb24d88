"""How long work tells that it is alive."""

from __future__ import annotations

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
