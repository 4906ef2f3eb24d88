"""What holds for every command: streams, JSON, exit codes, speed, no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvpack.cli.app import command_names
from tests.cli.conftest import Kvpack

TORCH_FREE = [
    ["--help"],
    ["recipes", "list"],
    ["recipes", "show", "rotatekv@4bit", "--resolved", "--json"],
    ["recipes", "validate", "rotatekv-w4"],
    ["recipes", "schema"],
    ["doctor"],
]
HEAVY = """
import sys
from kvpack.cli.entry import run
code = run(sys.argv[1:])
loaded = sorted({"torch", "transformers", "numpy", "datasets"} & sys.modules.keys())
sys.stderr.write(f"LOADED {loaded}")
raise SystemExit(code)
"""


@pytest.mark.parametrize("arguments", TORCH_FREE, ids=" ".join)
def test_light_commands_import_nothing_heavy(run_kvpack: Kvpack, arguments: list[str]) -> None:
    done = run_kvpack(*arguments, code=HEAVY)
    assert done.code == 0, done.err
    assert done.err.endswith("LOADED []")


@pytest.mark.parametrize("command", command_names())
def test_every_command_has_help_and_the_common_options(run_kvpack: Kvpack, command: str) -> None:
    done = run_kvpack(*command.split(), "--help", COLUMNS="120")
    assert done.code == 0
    for option in ("--json", "--quiet", "--no-color", "--traceback"):
        assert option in done.out


def test_without_a_terminal_there_is_no_escape_sequence(run_kvpack: Kvpack) -> None:
    for arguments in (["recipes", "list"], ["doctor"], ["recipes", "show", "nothing"]):
        done = run_kvpack(*arguments)
        assert "\x1b" not in done.out + done.err


def test_results_and_errors_use_different_streams(run_kvpack: Kvpack) -> None:
    good, bad = run_kvpack("recipes", "list"), run_kvpack("recipes", "show", "rotatkv")
    assert "rotatekv" in good.out
    assert good.err == ""
    assert bad.out == ""
    assert bad.err.startswith("error: no recipe 'rotatkv'")
    assert "did you mean 'rotatekv'" in bad.err


@pytest.mark.parametrize(
    ("arguments", "code", "error", "command"),
    [
        (["recipes", "show", "rotatkv"], 2, "E_RECIPE", "recipes show"),
        (["recipes", "show", "kivi", "--set", "calibration.samples=0"], 2, "E_RECIPE", "recipes show"),
        (["recipes", "show"], 2, "E_USAGE", "recipes show"),
        (["recipes", "frob"], 2, "E_USAGE", ""),
        (["recipes", "list", "--frob"], 2, "E_USAGE", "recipes list"),
        (["doctor", "/nonexistent"], 2, "E_USAGE", "doctor"),
        (["inspect", "/nonexistent"], 4, "E_SOURCE", "inspect"),
    ],
)
def test_failures_are_json_too(
    run_kvpack: Kvpack, arguments: list[str], code: int, error: str, command: str
) -> None:
    done = run_kvpack(*arguments, "--json")
    assert done.code == code
    assert done.json["error"]["code"] == error
    assert done.json["command"] == command
    assert done.json["data"] is None
    assert done.err == ""


CRASH = """
import sys
from kvpack.cli import recipes
def boom(*_): raise RuntimeError("spilled coffee")
recipes.bundled = boom
from kvpack.cli.entry import run
raise SystemExit(run(sys.argv[1:]))
"""


def test_a_bug_leaves_a_crash_file_and_no_traceback(run_kvpack: Kvpack, tmp_path: Path) -> None:
    done = run_kvpack("recipes", "list", "--json", code=CRASH)
    assert done.code == 70
    error = done.json["error"]
    assert error["code"] == "E_INTERNAL"
    assert "spilled coffee" in error["message"]
    (crash,) = tmp_path.glob("kvpack-crash-*.txt")
    assert str(crash) in error["hint"]
    assert "Traceback" in crash.read_text()
    assert done.err == ""


def test_traceback_is_shown_when_asked(run_kvpack: Kvpack) -> None:
    assert "Traceback" in run_kvpack("recipes", "list", "--traceback", code=CRASH).err
    expected = run_kvpack("recipes", "show", "nothing", "--traceback")
    assert "Traceback" in expected.err
    assert expected.code == 2


NOISY = """
import sys
from kvpack.cli import recipes
inner = recipes.bundled
def noisy(): print("chatter of a library"); return inner()
recipes.bundled = noisy
from kvpack.cli.entry import run
raise SystemExit(run(sys.argv[1:]))
"""


def test_what_libraries_print_never_reaches_standard_output(run_kvpack: Kvpack) -> None:
    done = run_kvpack("recipes", "list", "--json", code=NOISY)
    assert done.json["ok"]
    assert "chatter" in done.err


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m kvpack recipes schema | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


WAITING = """
import sys, time
from kvpack.cli import main, recipes
def wait():
    try:
        sys.stderr.write("ready\\n"); sys.stderr.flush()
        time.sleep(60)
    finally:
        {cleanup}
recipes.bundled = wait
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "again", "code"),
    [(signal.SIGINT, False, 75), (signal.SIGTERM, False, 75), (signal.SIGINT, True, 130)],
)
def test_interruption(number: int, again: bool, code: int) -> None:
    cleanup = "sys.stderr.write('busy\\n'); sys.stderr.flush(); time.sleep(60)" if again else "pass"
    script = WAITING.format(cleanup=cleanup)
    process = subprocess.Popen(
        [sys.executable, "-c", script, "recipes", "list", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    if again:
        assert process.stderr.readline() == "busy\n"
        process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert ("E_INTERRUPTED" in out) == (not again)


def test_version(run_kvpack: Kvpack) -> None:
    from kvpack import __version__

    assert run_kvpack("--version").out == f"kvpack {__version__}\n"
