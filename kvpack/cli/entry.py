"""The outermost frame: every way a run can end, turned into text or JSON and an exit code."""

from __future__ import annotations

import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import cast

import typer

from kvpack import __version__
from kvpack.cli.run import print_error, print_json
from kvpack.core.errors import Interrupted, KvpackError, UsageError

_CLICK = cast("type[Exception]", typer.BadParameter.__mro__[2])
"""Click's `ClickException`; newer versions of typer carry their own copy of click."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: words after the program's name; those of this process when None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from kvpack.cli.app import app

        code = typer.main.get_command(app).main(words, prog_name="kvpack", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader has left (`kvpack ... | head`): not an error, but Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail(Interrupted("interrupted"), words)
    except KvpackError as error:
        return _fail(error, words)
    except _CLICK as error:
        return _fail(_usage_error(error), words)
    except Exception:
        return _fail(_crash(words), words, shown=True)


def catch_signals() -> None:
    """First Ctrl-C or SIGTERM: unwind and exit with 75. Second: leave at once with 130."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        os._exit(130)

    def first(_signal: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, leave)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, first)


def quiet_libraries() -> None:
    """Keep bars and remarks of transformers and the hub out of the log, unless the user set otherwise.

    They read these variables when they are imported. Bars stay where a person waits for a download.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (sys.stderr.isatty() and "--allow-download" in sys.argv):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _fail(error: KvpackError, words: list[str], shown: bool = False) -> int:
    if "--traceback" in words and not shown:
        traceback.print_exc()
    if "--json" in words:
        print_json(_command_of(words), None, [], error)
    else:
        print_error(error, no_color="--no-color" in words)
    return error.exit_code


def _command_of(words: list[str]) -> str:
    """The command as far as it can be told from words that may not have parsed."""
    from kvpack.cli.app import command_names

    plain = [word for word in words if not word.startswith("-")]
    names = command_names()
    candidates = (" ".join(plain[:2]), " ".join(plain[:1]))
    return next((name for name in candidates if name in names), "")


def _usage_error(error: BaseException) -> UsageError:
    message = getattr(error, "format_message", lambda: str(error))().rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "kvpack"
    return UsageError(message[:1].lower() + message[1:], hint=f"{path} --help")


def _crash(words: list[str]) -> KvpackError:
    """Write the crash file; show the traceback only when asked."""
    text = traceback.format_exc()
    if "--traceback" in words:
        sys.stderr.write(text)
    last = text.strip().splitlines()[-1]
    with tempfile.NamedTemporaryFile(
        "w", prefix="kvpack-crash-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"kvpack {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
        file.write(f"arguments: {words}\n\n{text}")
    return KvpackError(
        f"internal error: {last}", hint=f"this is a bug in kvpack; the details are in {file.name}"
    )
