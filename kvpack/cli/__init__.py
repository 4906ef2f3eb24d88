"""The command line: parses, calls the pipeline, prints. No logic of its own, no torch at import."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `kvpack` command."""
    from kvpack.cli.entry import catch_signals, quiet_libraries, run

    catch_signals()
    quiet_libraries()
    raise SystemExit(run())
