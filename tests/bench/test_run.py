"""Rounds and turns, without processes: workers of this one, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvpack.bench import run
from kvpack.bench.columns import columns_of
from kvpack.bench.measuring import Measuring, answer
from kvpack.bench.settings import Settings
from kvpack.core.access import CLOSED

SETTINGS = Settings(contexts=(20, 30), prompt_tokens=8, new_tokens=2, repeat=2, steps=2)


class Here:
    """A worker that measures in this process and writes down its turns."""

    def __init__(self, column: Any, dtype: str, seed: int, turns: list[tuple[str, str]]) -> None:
        self.column, self.turns = column, turns
        self.measuring = Measuring(column.kind, str(column.path), dtype, False, seed)

    def ready(self) -> dict[str, Any]:
        return {}

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.turns.append((do, self.column.name))
        return answer(self.measuring, {"do": do, **arguments})


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    made: list[tuple[str, str]] = []

    @contextmanager
    def started(column: Any, threads: int | None, dtype: str, seed: int) -> Iterator[Here]:
        yield Here(column, dtype, seed, made)

    monkeypatch.setattr(run, "started", started)
    return made


def test_columns_take_turns(turns: list[tuple[str, str]], tiny_model: Path, tiny_packed: Path) -> None:
    columns = columns_of(tiny_packed, tiny_model, "quantized-cache", CLOSED)
    told: list[str] = []
    steps: list[tuple[int, int]] = []
    made = run.bench(
        columns,
        SETTINGS,
        found=lambda measure: told.append(measure.name),
        progress=lambda stage, done, total, detail="": steps.append((done, total)),
    )
    names = ["source", "artifact", "quantized-cache"]
    rounds = ["load", "load", *["prompt"] * 3, *["fill", "steps", "steps"] * 2]
    assert turns == [(do, name) for do in rounds for name in names]
    assert steps[-1] == (len(turns), len(turns))
    assert told == [measure.name for measure in made.measures]
    assert made.complete
    assert made.described.keys() == set(names)
    by_name = {(m.name, m.context): m for m in made.measures}
    step = by_name["step", 30]
    assert [len(turn) for turn in step.rounds["source"]] == [2, 2]
    gain = step.gain("quantized-cache")
    assert gain is not None
    assert gain.count == 2
    assert len(by_name["prefill", None].values("artifact")) == 2
    held = by_name["kv_held", 30].gain("quantized-cache")
    assert held is not None
    assert held.median == pytest.approx(2, rel=0.01)


def test_an_artifact_alone_has_no_gains(turns: list[tuple[str, str]], tiny_packed: Path) -> None:
    made = run.bench(columns_of(tiny_packed, None, None, CLOSED), SETTINGS)
    assert {name for _, name in turns} == {"artifact"}
    assert not any(measure.gain("artifact") for measure in made.measures)


def test_an_interruption_keeps_what_is_there(
    turns: list[tuple[str, str]], tiny_packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = columns_of(tiny_packed, None, None, CLOSED)

    def stop(self: Measuring, **arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Measuring, "fill", stop)
    made = run.bench(columns, SETTINGS)
    assert not made.complete
    assert {"load", "prefill", "decode"} <= {measure.name for measure in made.measures}
    monkeypatch.setattr(Measuring, "load", stop)
    with pytest.raises(KeyboardInterrupt):
        run.bench(columns, SETTINGS)
