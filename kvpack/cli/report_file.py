"""The option `--report`: a picture of what was measured, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpack.core.errors import UsageError
from kvpack.core.new_file import check_free_file, write_text
from kvpack.evaluate.frontier import Comparison

Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Draw it: a .html file that needs nothing else, or a .svg with the plot alone.",
    ),
]
ForceReport = Annotated[bool, typer.Option("--force", help="Replace what is at --report.")]


def check_report(path: Path | None, force: bool) -> None:
    """Refuse a report that cannot be written before any work is done for it.

    Raises:
        UsageError: it exists, its folder does not, or its name has another ending.
    """
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".svg"):
        raise UsageError("is neither .html nor .svg", where=str(path), hint="--report out.html")
    check_free_file(path, "--report", force=force)


def draws_page(path: Path | None) -> bool:
    """Whether the report is a page, with room for more than the plot."""
    return path is not None and path.suffix.lower() == ".html"


def write_report(path: Path | None, made: Comparison) -> tuple[str, ...]:
    """Write the report, if one is wanted, and say so."""
    from kvpack.picture.page import page
    from kvpack.picture.plot import plot_file

    if path is None:
        return ()
    write_text(path, plot_file(made) if path.suffix.lower() == ".svg" else page(made))
    return (f"wrote {path}",)
