"""`kvpack calibrate --sinks`, and `kvpack inspect` of what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvpack import pipeline
from kvpack.cli.sinks import sink_lines, strongest_channel
from tests.cli.conftest import Kvpack
from tests.cli.test_contract import HEAVY

SMALL = [f"calibration.{k}" for k in ("samples=2", "sample_tokens=32", "batch=2")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 80)
    return str(path)


@pytest.fixture(scope="module")
def calibrated(tiny_source: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of four-bit weights, with sinks."""
    out = tmp_path_factory.mktemp("calibrated") / "calibration"
    plan = pipeline.make_plan(tiny_source, "w4", [*SMALL, f"calibration.data={text}"])
    return pipeline.calibrate(plan, out, sinks=True).path


def test_both_commands_come_next(
    call_kvpack: Kvpack, tiny_source: str, text: str, calibrated: Path, tmp_path: Path
) -> None:
    out, changes = tmp_path / "calibration", [f"--set={change}" for change in SMALL]
    arguments = ["-r", "w4", "--sinks", "--data", text, *changes, "-o", str(out)]
    done = call_kvpack("calibrate", tiny_source, *arguments)
    assert done.code == 0, done.err
    assert "kvpack inspect" in done.out
    assert "kvpack export" in done.out
    assert (out / "sinks.json").read_bytes() == (calibrated / "sinks.json").read_bytes()


def test_everything_in_json(call_kvpack: Kvpack, calibrated: Path) -> None:
    data = call_kvpack("inspect", str(calibrated), "--json").json["data"]
    assert data["solved_layers"] == 14
    assert len(data["output_errors"]) == 14
    assert all(error > 0 for error in data["output_errors"].values())
    assert data["identity"].keys() >= {"weight parts", "kv_cache transforms", "model files"}
    assert [layer["layer"] for layer in data["sinks"]["layers"]] == [0, 1]
    assert data["sinks"]["epsilon"] == 0.3


def test_text_has_tables_and_a_map(call_kvpack: Kvpack, calibrated: Path) -> None:
    out = call_kvpack("inspect", str(calibrated)).out
    assert "mean output error" in out
    assert "14, in order" in out
    assert "Sink 1: " in out
    assert "layers down, heads across" in out
    assert "\x1b" not in out


def test_looking_needs_no_torch(run_kvpack: Kvpack, calibrated: Path) -> None:
    done = run_kvpack("inspect", str(calibrated), code=HEAVY)
    assert done.code == 0
    assert done.err.endswith("LOADED []")


def test_changed_files_are_refused(call_kvpack: Kvpack, calibrated: Path, tmp_path: Path) -> None:
    file = Path(shutil.copytree(calibrated, tmp_path / "copy")) / "sinks.json"
    file.write_text(file.read_text().replace("0.3", "0.2"))
    done = call_kvpack("inspect", str(file.parent), "--json")
    assert done.code == 4
    assert "changed" in done.json["error"]["message"]


def test_without_a_recipe_only_sinks_are_measured(
    call_kvpack: Kvpack, tiny_source: str, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "sinks"
    done = call_kvpack("calibrate", tiny_source, "--sinks", "--data", text, "-o", str(out))
    assert done.code == 0, done.err
    assert "kvpack export" not in done.out
    assert {p.name for p in out.iterdir()} == {"calibration.json", "sinks.json"}
    assert json.loads((out / "calibration.json").read_text())["linears"] == {}


def test_something_must_be_measured(call_kvpack: Kvpack, tiny_source: str, tmp_path: Path) -> None:
    done = call_kvpack("calibrate", tiny_source, "-o", str(tmp_path / "none"))
    assert done.code == 2
    assert "--sinks" in done.err


def test_too_little_text(call_kvpack: Kvpack, tiny_source: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short. " * 20)
    arguments = ["--sinks", "--data", str(tmp_path / "short.txt"), "-o", str(tmp_path / "out")]
    done = call_kvpack("calibrate", tiny_source, *arguments)
    assert done.code == 2
    assert "give more text" in done.err
    assert not (tmp_path / "out").exists()


def report(first: float, positions: list[int]) -> dict[str, Any]:
    rates = [[first, 0.0], [0.0, 0.0]]
    layer = {
        "layer": 0, "sink_rate": rates, "attention": rates,
        "key_channel_max": [[1.0, 1.0, 5.0], [1.0, 1.0, 2.0]],
        "hidden_norm_ratio": 30.0, "key_norm_ratio": None, "value_norm_ratio": 0.5,
    }  # fmt: skip
    return {
        "tokens": 64, "samples": 2, "epsilon": 0.3, "layers": [layer], "sink_rate": [first / 2, 0.0],
        "positions": positions, "n_sink": len(positions),
        "later_tokens": [{"token": 3, "text": "\n", "count": 2}],
    }  # fmt: skip


def shown(lines: list[Any], **terminal: Any) -> str:
    console = Console(width=160, **terminal)
    with console.capture() as captured:
        for line in lines:
            console.print(line, markup=False, highlight=False)
    return captured.get()


def test_a_sink_leads_to_a_setting() -> None:
    text = shown(sink_lines(report(0.64, [0])))
    assert "1 (32%)" in text
    assert "--set kv_cache.policy.sink_tokens=1" in text
    assert "5.0x  head 0, channel 2" in text
    assert "'\\n' (2)" in text
    assert text.splitlines()[-1].endswith("%%  |")


def test_no_sink_leads_to_none() -> None:
    text = shown(sink_lines(report(0.0, [])))
    assert "sink_tokens" not in text
    assert "promise little" in text


def test_the_map_has_colours_in_a_terminal() -> None:
    assert "\x1b[48" in shown(sink_lines(report(0.64, [0]))[-1:], force_terminal=True, color_system="256")


def test_channels_of_dead_heads_do_not_divide_by_zero() -> None:
    assert strongest_channel([[0.0, 0.0]]) == (1.0, 0, 0)
    assert strongest_channel([[1.0, 2.0, 4.0], [1.0, 1.0, 3.0]]) == (3.0, 1, 2)
