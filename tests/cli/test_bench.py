"""`kvpack bench`: real processes on a tiny model; no test says how long anything takes."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from kvpack.bench.measuring import Measuring
from tests.bench.test_run import turns as turns  # workers of this process instead of their own
from tests.cli.conftest import Kvpack

QUICK = ["--prompt-tokens", "24", "--new-tokens", "2", "--steps", "2", "--threads", "1"]
COMPARED = {"load", "load_peak", "prefill", "decode", "prompt_peak", "step", "kv_held", "step_peak"}


def test_json_and_page(call_kvpack: Kvpack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPACK_KERNELS", "reference")  # its processes need not compile any
    page = tmp_path / "page.html"
    shape = ["--synthetic", "tiny", "--layers", "1", "--recipe", "kivi"]
    shape += ["--set", "kv_cache.policy.recent_tokens=32"]
    many = ["--context", "40,2100", "--repeat", "1", "--report", str(page)]
    done = call_kvpack("bench", *shape, *many, *QUICK, "--json")
    assert done.err == ""
    data = done.json["data"]
    assert data["complete"]
    assert [c["name"] for c in data["columns"]] == ["source", "artifact"]
    assert [c["cache"] for c in data["columns"]] == ["DynamicCache", "KVPackCache"]
    assert {c["dtype"] for c in data["columns"]} == {"bfloat16"}
    assert {c["threads"] for c in data["columns"]} == {1}
    assert data["settings"]["contexts"] == [40, 2100]
    assert set(data["filled"]["40"].values()) == {"model"}
    assert set(data["filled"]["2100"].values()) == {"random"}
    assert data["machine"]["versions"]["torch"]
    check_measures(data["measures"])
    held = {m["context"]: m["gain"]["artifact"]["median"] for m in data["measures"] if m["name"] == "kv_held"}
    assert held[2100] > 3
    text = page.read_text()
    assert "<svg" in text
    assert "Time of a decode step" in text
    assert "://" not in text


def check_measures(measures: list[dict[str, Any]]) -> None:
    """Positive, finite, as often as was asked."""
    names = {(m["name"], m["context"]) for m in measures}
    assert {name for name, _ in names} >= COMPARED
    assert {("step", 40), ("step", 2100), ("load", None)} <= names
    for measure in (m for m in measures if m["name"] != "kv_process"):
        for column in ("source", "artifact"):
            found = measure["values"][column]
            every = [v for turn in measure["rounds"][column] for v in turn]
            assert found["count"] == len(every) == (2 if measure["name"] == "step" else 1)
            assert all(0 < v < math.inf for v in (*every, found["low"], found["median"], found["high"]))
            alone = column == "source" or measure["name"].startswith("first_")
            assert (measure["gain"][column] is None) == alone


def test_text_and_plot_of_an_artifact_alone(
    call_kvpack: Kvpack, tiny_artifact: str, tmp_path: Path, turns: list[tuple[str, str]]
) -> None:
    plot = tmp_path / "plot.svg"
    done = call_kvpack("bench", tiny_artifact, "--context", "40", "--report", str(plot), *QUICK)
    assert done.code == 0
    assert "load to first token, s: artifact " in done.err
    assert "step at 40, ms: artifact " in done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("artifact: LlamaForCausalLM of artifact, float32, KVPackCache")
    assert lines[1].split() == ["artifact"]
    assert any(line.startswith("step at 40, ms") for line in lines)
    assert lines[-1] == f"wrote {plot}"
    assert ET.fromstring(plot.read_text()).tag.endswith("svg")


def test_ctrl_c_prints_what_is_there(
    call_kvpack: Kvpack, tiny_artifact: str, monkeypatch: pytest.MonkeyPatch, turns: list[tuple[str, str]]
) -> None:
    def stop(self: Measuring, **arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Measuring, "fill", stop)
    done = call_kvpack("bench", tiny_artifact, "--context", "40", *QUICK, "--json")
    assert done.code == 75
    assert done.json["error"]["code"] == "E_INTERRUPTED"
    assert not done.json["data"]["complete"]
    assert done.json["data"]["measures"][0]["name"] == "load"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "neither an artifact nor --synthetic"),
        (["ARTIFACT", "--synthetic", "tiny"], 2, "an artifact and --synthetic"),
        (["ARTIFACT", "--recipe", "rtn"], 2, "--recipe belongs to --synthetic"),
        (["--synthetic", "tiny"], 2, "--synthetic needs --recipe"),
        (["--synthetic", "huge", "--recipe", "rtn"], 2, "no shape is called 'huge'"),
        (["--synthetic", "tiny", "--recipe", "rtn", "--source", "x"], 2, "--source and --synthetic"),
        (["ARTIFACT", "--context", "4k"], 2, "cannot read the contexts"),
        (["ARTIFACT", "--context", "500"], 2, "a context of 500 tokens and 42 steps need 542 positions"),
        (["ARTIFACT", "--source", "nowhere/at-all/here"], 4, "is not a model folder"),
        (["ARTIFACT", "--against", "quantized-cache"], 2, "needs --source"),
        (["ARTIFACT", "--fill", "half"], 2, "--fill cannot be 'half'"),
        (["ARTIFACT", "--report", "bench.pdf"], 2, "is neither .html nor .svg"),
        (["nowhere"], 4, "holds no kvpack.json"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    call_kvpack: Kvpack, tiny_artifact: str, arguments: list[str], code: int, said: str
) -> None:
    words = [tiny_artifact if word == "ARTIFACT" else word for word in arguments]
    done = call_kvpack("bench", *words, "--json")
    assert done.code == code
    assert said in done.json["error"]["message"]
