"""`--target-bpw` and `--target-size`, and the weights' axis of `kvpack compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Kvpack, Run

SMALL = ("--set", "calibration.samples=3", "--set", "calibration.sample_tokens=24")
ALL = ("--set", "weights.0.match=@all", "--set", "weights.0.codec.group.size=32")


@pytest.fixture
def kvpack(call_kvpack: Kvpack, tiny_source: str, tmp_path: Path) -> Callable[..., Run]:
    def run(command: str, *arguments: str) -> Run:
        cache = ("--cache", str(tmp_path / "cache"))
        everything = () if command == "compare" else ALL
        return call_kvpack(command, tiny_source, *arguments, *SMALL, *everything, *cache)

    return run


def test_plan_shows_where_the_bits_go(kvpack: Callable[..., Run]) -> None:
    data = kvpack("plan", "-r", "rtn", "--target-bpw", "5", "--json").json["data"]
    budget = data["budget"]
    assert 4.95 <= data["artifact"]["bits_per_weight"] == budget["bits_per_weight"] <= 5
    assert budget["bytes"] == data["artifact"]["bytes"] <= budget["target_bytes"]
    assert sum(row["bytes"] for row in budget["by_role"]) == budget["bytes"]
    roles = {row["role"]: row for row in budget["by_role"]}
    assert {"q", "down", "embedding", "lm_head", "norms and biases"} <= roles.keys()
    assert sum(roles["q"]["widths"].values()) == roles["q"]["tensors"] == 2
    done = kvpack("plan", "-r", "rtn", "--target-bpw", "5")
    assert "where the bits go" in done.out
    assert "below the target; " in done.out


def test_a_size_is_the_size_of_the_weights(kvpack: Callable[..., Run], tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = kvpack("export", "-r", "rtn", "--target-size", "80kB", "-o", str(out), "--json").json["data"]
    assert 79_200 <= data["weight_bytes"] <= 80_000
    assert data["weight_bytes"] == data["planned_weight_bytes"]


def test_a_target_replaces_the_one_before(kvpack: Callable[..., Run]) -> None:
    one = ("--set", "budget.target_bytes=70000", "--target-bpw", "5", "--json")
    assert kvpack("plan", "-r", "rtn", *one).json["data"]["budget"]["target_bytes"] != 70_000


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--target-bpw", "3", "--target-size", "9MB"), "both given"),
        (("--target-size", "900"), "cannot read the size"),
        (("--target-size", "1kB"), "cannot be met"),
    ],
)
def test_refusals(kvpack: Callable[..., Run], arguments: tuple[str, ...], text: str) -> None:
    done = kvpack("plan", "-r", "rtn", *arguments)
    assert done.code == 2
    assert text in done.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--axis", "kvs"), "--axis cannot be"),
        (("--packed-bpw", "3"), "need --axis weights"),
        (("--axis", "weights", "--packed-bpw", "3,x"), "no list of bits"),
        (("--axis", "weights", "--packed-bpw", "3", "--target-bpw", "3"), "both given"),
        (("--axis", "weights", "--task", "recall"), "scores text"),
    ],
)
def test_refused_comparisons(kvpack: Callable[..., Run], arguments: tuple[str, ...], text: str) -> None:
    done = kvpack("compare", "-r", "rtn", *arguments)
    assert done.code == 2
    assert text in done.err


def test_weights_are_compared_at_equal_stored_bits(kvpack: Callable[..., Run], tmp_path: Path) -> None:
    text, report = tmp_path / "text.txt", tmp_path / "frontier.svg"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12)
    settings = ("--data", str(text), "--context", "96", "--max-tokens", "192", "--report", str(report))
    groups = ("--set", "weights.0.codec.group.size=32")
    arguments = ("-r", "rtn,gptq", "--axis", "weights", "--packed-bpw", "2,4,6.5", *settings, *groups)
    data = kvpack("compare", *arguments, "--json").json["data"]
    assert data["axis"] == "packed"
    rows = {row["recipe"]: row for row in data["recipes"]}
    assert rows.keys() == {f"{name} {bits}" for name in ("rtn", "gptq") for bits in ("2", "4", "6.5")}
    assert "cannot be met" in rows["rtn 2"]["reason"]
    for bits in (4, 6.5):
        for name in ("rtn", "gptq"):
            assert rows[f"{name} {bits:g}"]["reason"] is None
            assert 0.99 * bits <= rows[f"{name} {bits:g}"]["packed_bits"] <= bits
            assert rows[f"{name} {bits:g}"]["packed"].keys() == {"weights"}
    assert data["frontier"]["weights"]
    drawn = report.read_text()
    assert "stored bits per weight of the packed layers" in drawn
    assert "KV" not in drawn


def test_caches_stay_out_of_a_comparison_of_weights(kvpack: Callable[..., Run], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12)
    settings = ("--data", str(text), "--context", "96", "--max-tokens", "192", "--axis", "weights")
    data = kvpack("compare", "-r", "rotatekv-w4", *settings, "--json").json["data"]
    assert data["recipes"][0]["packed"].keys() == {"weights"}
    assert 4 < data["recipes"][0]["packed_bits"] < 6
