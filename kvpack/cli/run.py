"""What all commands share: common options, one result object, one JSON envelope, exit codes.

A command is a function that takes a `Session` and its own arguments and returns a `Result`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack import __version__
from kvpack.cli.console import log_console, result_console
from kvpack.cli.progress import Reporter, reporter
from kvpack.core.errors import Interrupted, KvpackError

_PACKAGE = Path(__file__).parents[1]
SCHEMA = "kvpack.output/1"
"""Name and version of the JSON envelope, see ``output.schema.json``."""


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        data: dataclass or mapping for ``--json``.
        lines: what a person sees, rich renderables or text, from top to bottom.
        failure: set when the command worked and its answer is no; decides the exit code.
    """

    data: Any
    lines: tuple[Any, ...]
    failure: KvpackError | None = None


@dataclass
class Session:
    """One run of a command: where progress goes, and the warnings so far."""

    progress: Reporter
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Tell the user something that does not stop the command."""
        self.warnings.append(text)


_COMMON: dict[str, Any] = {
    "json_output": Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")],
    "no_color": Annotated[bool, typer.Option("--no-color", help="Plain text; so is NO_COLOR=1.")],
    "traceback": Annotated[bool, typer.Option("--traceback", help="On failure, show where in the code.")],
}


def command(function: Callable[..., Result]) -> Callable[..., None]:
    """Turn ``function(session, ...) -> Result`` into a typer command with the common options."""
    signature = inspect.signature(function, eval_str=True)
    own = [p for name, p in signature.parameters.items() if name != "session"]
    keyword = inspect.Parameter.KEYWORD_ONLY
    common = [
        inspect.Parameter(name, keyword, default=False, annotation=kind) for name, kind in _COMMON.items()
    ]
    parameters = [*(p.replace(kind=keyword) for p in own), *common]

    @functools.wraps(function)
    def call(json_output: bool, quiet: bool, no_color: bool, traceback: bool, **arguments: Any) -> None:
        session = Session(reporter(log_console(no_color), quiet=quiet or json_output))
        try:
            with _caught_warnings(session), session.progress, contextlib.redirect_stdout(sys.stderr):
                result = function(session, **arguments)
        except KeyboardInterrupt:
            # Here and not in the outer frame: typer would turn it into a bare exit code on the way.
            hint = "nothing half-written remains; run the same command again"
            raise Interrupted("interrupted", hint=hint) from None
        if json_output:
            print_json(function_name(function), result, session.warnings)
        else:
            _print_text(result, session, no_color)
        if result.failure is not None:
            raise typer.Exit(result.failure.exit_code)

    call.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]  # read by typer
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


@contextlib.contextmanager
def _caught_warnings(session: Session) -> Iterator[None]:
    """Python warnings of kvpack become warnings of the session; those of libraries are dropped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", RuntimeWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning) and _PACKAGE in Path(warning.filename).parents:
            session.warn(str(warning.message))


def function_name(function: Callable[..., Any]) -> str:
    """Name of a command as typed: `recipes_show` -> "recipes show"."""
    return function.__name__.rstrip("_").replace("_", " ")


def _print_text(result: Result, session: Session, no_color: bool) -> None:
    log = log_console(no_color)
    for warning in session.warnings:
        log.print(f"warning: {warning}", style="yellow")
    print_lines(result.lines, no_color)
    if result.failure is not None:
        print_error(result.failure, no_color)


def print_lines(lines: Sequence[Any], no_color: bool = False) -> None:
    """Text and tables on standard output; without a terminal, without the padding of tables."""
    console = result_console(no_color)
    with console.capture() as captured:
        for line in lines:
            console.print(line)
    text = captured.get()
    if not console.is_terminal:
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    sys.stdout.write(text)


def print_error(error: KvpackError, no_color: bool = False) -> None:
    """An expected failure, on standard error."""
    console = log_console(no_color)
    for line in error.message.splitlines():
        console.print(f"error: {line}", style="red")
    for line in error.hint.splitlines():
        console.print(f"  hint: {line.strip()}")


def print_json(
    name: str, result: Result | None, remarks: list[str], error: KvpackError | None = None
) -> None:
    """The envelope, the only thing on standard output."""
    failure = error if error is not None else result.failure if result is not None else None
    envelope = {
        "schema": SCHEMA,
        "kvpack_version": __version__,
        "ok": failure is None,
        "command": name,
        "data": jsonable(result.data) if result is not None else None,
        "warnings": remarks,
        "error": None
        if failure is None
        else {"code": failure.code, "message": failure.message, "hint": failure.hint},
    }
    sys.stdout.write(json.dumps(envelope, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def jsonable(value: Any) -> Any:
    """Plain JSON data: dataclasses become objects, NaN and infinities become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
