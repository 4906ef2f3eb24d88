"""Progress: rare plain lines without a terminal, a bar with one, silence when asked."""

from __future__ import annotations

import io

from rich.console import Console

from kvpack.cli.progress import Bars, Lines, Reporter, peak_memory_bytes, reporter
from kvpack.core.progress import paced


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_first_last_and_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(Console(file=stream, width=200), clock)
    for step in range(101):
        clock.now = float(step)
        lines("pack", step, 100, f"layer {step}")
    shown = [line.split()[1].rstrip(",") for line in stream.getvalue().splitlines()]
    assert shown == ["0/100", *(f"{n}/100" for n in range(10, 101, 10))]
    assert "01:30 left" in stream.getvalue().splitlines()[1]


def test_pace_is_the_mean_since_the_stage_began() -> None:
    clock, told = Clock(), []
    tell = paced(lambda *state: told.append(state), "export", 4, "MB/s", clock)
    tell(0, 0.0, "first")
    clock.now = 2.0
    tell(1, 3000.0, "second")
    tell(4, 3000.0)
    assert told == [
        ("export", 0, 4, "first"),
        ("export", 1, 4, "second, 1,500 MB/s"),
        ("export", 4, 4, "1,500 MB/s"),
    ]


def test_two_stages_have_their_own_pace() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(Console(file=stream, width=200), clock)
    lines("scan", 0, 9)
    lines("pack", 0, 9)
    lines("scan", 1, 9)
    assert len(stream.getvalue().splitlines()) == 2


def test_bar_shows_stage_step_and_memory_and_lets_go() -> None:
    stream = io.StringIO()
    with Bars(Console(file=stream, force_terminal=True, width=160)) as bars:
        bars("calibrate", 3, 12, "block 3")
        bars("calibrate", 12, 12, "block 12")
    text = stream.getvalue()
    for part in ("calibrate", "12/12", "GiB", "block 12"):
        assert part in text


def test_choice_of_reporter() -> None:
    terminal, pipe = Console(file=io.StringIO(), force_terminal=True), Console(file=io.StringIO())
    assert isinstance(reporter(terminal), Bars)
    assert isinstance(reporter(pipe), Lines)
    assert type(reporter(terminal, quiet=True)) is Reporter


def test_ci_gets_lines_even_on_a_terminal(monkeypatch) -> None:
    from kvpack.cli.console import make_console

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("CI", raising=False)
    assert make_console(Terminal()).is_terminal
    monkeypatch.setenv("CI", "true")
    assert not make_console(Terminal()).is_terminal


def test_no_color_is_respected(monkeypatch) -> None:
    from kvpack.cli.console import make_console

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("CI", raising=False)
    for no_color, colored in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", "xterm-256color")
        stream = Terminal()
        make_console(stream).print("text", style="red")
        assert ("\x1b[31m" in stream.getvalue()) == colored


def test_peak_memory_is_plausible() -> None:
    assert 10e6 < peak_memory_bytes() < 1e12
