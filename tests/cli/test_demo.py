"""`kvpack demo`: the whole main job, for someone who has just installed it, without a network."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvpack import demo as demo_module
from kvpack.evaluate.artifact import EvaluationSettings
from tests.cli.conftest import Kvpack

OFFLINE = """
import os, sys
def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        sys.__stderr__.write(f"NETWORK {event} {arguments}")
        sys.__stderr__.flush()
        os._exit(99)
sys.addaudithook(forbid)
"""
MAIN = "from kvpack.cli import main\nmain()"
CALL = "import socket\nsocket.create_connection(('127.0.0.1', 9))"


def test_the_guard_sees_a_connection(run_kvpack: Kvpack) -> None:
    done = run_kvpack(code=OFFLINE + CALL)
    assert done.code == 99
    assert "NETWORK socket." in done.err


def test_it_runs_offline_from_end_to_end(run_kvpack: Kvpack, tmp_path: Path) -> None:
    start = time.monotonic()
    done = run_kvpack("demo", "--recipe", "kivi", "--json", code=OFFLINE + MAIN, OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    assert time.monotonic() - start < 100  # about 12 on one free core
    assert done.err == ""
    data = done.json["data"]
    assert data["recipe"] == "kivi"
    assert data["weight_bytes"] == data["source_weight_bytes"] < data["artifact_bytes"]
    assert [c["name"] for c in data["checks"]] == ["files", "decode", "source", "logits"]
    assert all(check["passed"] for check in data["checks"])
    found = data["evaluation"]
    assert 1 < found["source"]["perplexity"] < 60, "the embedded model has learnt something"
    assert found["packed"]["decode"]["ppl_ratio"] < 1.1
    assert 2 < found["kv_bits_per_element"] < 5
    assert len(data["continuations"]) == 2
    for item in data["continuations"]:
        assert item["source"].startswith(item["prompt"])
        assert len(item["packed"]) > len(item["prompt"])
    assert list(tmp_path.glob("kvpack-*")) == [], "the temporary folder is gone"


def test_text_for_people_and_the_artifact_to_keep(
    call_kvpack: Kvpack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = EvaluationSettings(context_tokens=200, max_tokens=200)
    monkeypatch.setattr(demo_module, "EVALUATION", small)
    monkeypatch.setattr(demo_module, "NEW_TOKENS", 4)
    out = tmp_path / "out"
    done = call_kvpack("demo", "-r", "kivi", "-o", str(out))
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("source", "packed"))] == [
        "source",
        "packed",
    ] * 2
    assert lines[-1] == f"the artifact is in {out}"
    for row in ("weight bytes", "KV bits per element", "perplexity (decode)", "top-1 agreement (prefill)"):
        assert sum(line.startswith(row) for line in lines) == 1
    assert (out / "kvpack.json").exists()
    again = call_kvpack("demo", "-r", "kivi", "-o", str(out))
    assert again.code == 2
    assert "--force" in again.err


def test_an_unknown_recipe_is_refused_at_once(run_kvpack: Kvpack) -> None:
    done = run_kvpack("demo", "-r", "kivvi")
    assert done.code == 2
    assert "did you mean 'kivi" in done.err
