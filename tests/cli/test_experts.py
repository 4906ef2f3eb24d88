"""Cold experts are named wherever a calibration or what was made with it is shown."""

from __future__ import annotations

from pathlib import Path

from kvpack.cli.experts import expert_lines
from tests.cli.conftest import Kvpack
from tests.tiny_models import make_model

NAME = "model.layers.0.mlp.experts.3"


def test_every_command_names_them(call_kvpack: Kvpack, tmp_path: Path) -> None:
    source = str(make_model(tmp_path / "source", "mixtral", layers=1, cold_expert=3))
    made, out = str(tmp_path / "calibration"), str(tmp_path / "out")
    changes = ["--set=calibration.samples=16", "--set=calibration.sample_tokens=64"]
    arguments = [source, "-r", "w4", *changes]
    assert f"{NAME}: 0 tokens" in call_kvpack("calibrate", *arguments, "-o", made).out
    exported = call_kvpack("export", *arguments, "--calibration", made, "-o", out, "--json").json["data"]
    assert exported["experts"]["cold"] == {NAME: 0}
    for folder in (made, out):
        shown = call_kvpack("inspect", folder)
        assert f"{NAME}: 0 tokens" in shown.out, shown.err
    assert len(call_kvpack("inspect", made, "--json").json["data"]["experts"]["tokens"]) == 4


def test_plans_count_experts_by_rule(call_kvpack: Kvpack, tmp_path: Path) -> None:
    source = str(make_model(tmp_path / "source", "mixtral", layers=1))
    rows = call_kvpack("plan", source, "-r", "w4", "--json").json["data"]["weights"]
    assert [(row["match"], row["tensors"]) for row in rows] == [("@linear", 16), ("all other tensors", 6)]


def test_lines() -> None:
    assert expert_lines(None) == expert_lines({}) == []
    warm = {"measured": 8, "fewest_tokens": 256, "cold": {}}
    assert expert_lines(warm) == ["experts: 8 calibrated, each by its own tokens"]
    many = expert_lines({**warm, "cold": {f"e.{i}": i for i in range(12)}})
    assert len(many) == 12
    assert many[1] == "  e.0: 0 tokens"
    assert many[-1] == "  and 2 more, see --json"
