"""Consoles and the few shapes of text that commands print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO

from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 200


def make_console(stream: IO[str], no_color: bool = False) -> Console:
    """A console that writes plain, unwrapped lines unless `stream` is a terminal.

    `NO_COLOR` is respected; with `CI` set even a terminal gets plain lines.
    """
    terminal = stream.isatty() and not os.environ.get("CI")
    return Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else _PLAIN_WIDTH,
        no_color=no_color or None,
        highlight=False,
        markup=False,
        soft_wrap=not terminal,
    )


def result_console(no_color: bool = False) -> Console:
    """Standard output: the result and nothing else."""
    return make_console(sys.stdout, no_color)


def log_console(no_color: bool = False) -> Console:
    """Standard error: progress, warnings and errors."""
    return make_console(sys.stderr, no_color)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> Table:
    """A borderless table.

    Args:
        columns: headings.
        rows: cells, shown as text.
        right: headings of right-aligned columns.
    """
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    return grid
