"""`kvpack calibrate` and `kvpack export` as a user runs them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import Kvpack

SMALL = [
    "--set", "calibration.samples=2", "--set", "calibration.sample_tokens=32",
    "--set", "weights.0.match=layers.0.self_attn.{q,k}_proj",
]  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_export_writes_what_plan_promised(call_kvpack: Kvpack, demo_model: str, out: Path) -> None:
    planned = call_kvpack("plan", demo_model, "-r", "w8", "--json").json["data"]
    done = call_kvpack("export", demo_model, "-r", "w8", "-o", str(out), "--json")
    data = done.json["data"]
    assert data["weight_bytes"] == data["planned_weight_bytes"] == planned["artifact"]["bytes"]
    assert data["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    shown = call_kvpack("inspect", str(out), "--json").json["data"]
    assert shown["weight_bytes"] == data["weight_bytes"]
    assert shown["recipe"]["name"] == "w8"


def test_the_command_that_calibrate_suggests_works_as_it_stands(
    call_kvpack: Kvpack, demo_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = call_kvpack("calibrate", demo_model, "-r", "w4", "-o", "my calibration", *SMALL)
    words = shlex.split(made.out.splitlines()[-1].removeprefix("next: "))
    assert words[:2] == ["kvpack", "export"]
    assert call_kvpack(*words[1:]).code == 0
    assert (tmp_path / "out" / "kvpack.json").is_file()


def test_calibration_is_made_once_and_used_again(
    call_kvpack: Kvpack, demo_model: str, tmp_path: Path
) -> None:
    calibration, out = str(tmp_path / "calibration"), str(tmp_path / "out")
    made = call_kvpack("calibrate", demo_model, "-r", "w4", "-o", calibration, *SMALL, "--json")
    assert made.json["data"]["tokens"] == 64
    assert made.json["data"]["solved_layers"] == 2
    assert call_kvpack("inspect", calibration, "--json").json["data"]["type"] == "calibration"
    export = ["export", demo_model, "-r", "w4", "-o", out, "--calibration", calibration]
    refused = call_kvpack(*export, *SMALL, "--set", "calibration.seed=1", "--json")
    assert refused.code == 2
    assert refused.json["error"]["code"] == "E_CALIBRATION"
    assert not Path(out).exists()
    assert call_kvpack(*export, *SMALL).code == 0


def test_nothing_is_overwritten_without_force(call_kvpack: Kvpack, demo_model: str, out: Path) -> None:
    out.mkdir()
    (out / "mine").write_text("precious")
    done = call_kvpack("export", demo_model, "-r", "kivi", "-o", str(out), "--json")
    assert done.code == 2
    assert done.json["error"]["code"] == "E_USAGE"
    assert os.listdir(out) == ["mine"]


def test_dry_run_writes_nothing(call_kvpack: Kvpack, demo_model: str, out: Path) -> None:
    for command in ("calibrate", "export"):
        dry = call_kvpack(command, demo_model, "-r", "w4", "-o", str(out), "--dry-run", "--json")
        assert dry.json["data"] == call_kvpack("plan", demo_model, "-r", "w4", "--json").json["data"]
        assert not out.exists()


def test_data_is_short_for_an_override(call_kvpack: Kvpack, demo_model: str, tmp_path: Path) -> None:
    text = tmp_path / "it's: a text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    calibration = tmp_path / "calibration"
    done = call_kvpack(
        "calibrate", demo_model, "-r", "w4", "-o", str(calibration), *SMALL, "--data", str(text)
    )
    assert done.code == 0, done.err
    data = call_kvpack("inspect", str(calibration), "--json").json["data"]
    assert data["identity"]["data"] == text.name
