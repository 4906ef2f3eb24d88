"""`kvpack eval --task recall`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpack import pipeline
from tests.cli.conftest import Kvpack, Run


@pytest.fixture(scope="module")
def packed(speaker: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recall") / "artifact"
    pipeline.export(pipeline.make_plan(speaker, "kivi", ["kv_cache.policy.recent_tokens=32"]), path)
    return str(path)


@pytest.fixture
def ask(call_kvpack: Kvpack, packed: str) -> Kvpack:
    def run(*arguments: str) -> Run:
        size = ["--recall-tokens", "100", "--recall-facts", "5", "--sequences", "2"]
        return call_kvpack("eval", packed, "--task", "recall", *size, *arguments)

    return run


def test_json(ask: Kvpack, speaker: str) -> None:
    data = ask("--source", speaker, "--json").json["data"]
    assert (data["task"], data["tokens"], data["facts"], data["questions"]) == ("recall", 100, 5, 5)
    assert (data["sequences"], data["seed"]) == (2, 0)
    assert data["packed"].keys() == {"prefill", "decode"}
    for metrics in data["packed"].values():
        assert metrics.keys() == {"recall", "recall_loss", "weight_bits", "kv_bits"}
        assert metrics["recall_loss"] == pytest.approx(data["source"]["recall"] - metrics["recall"])


def test_text(ask: Kvpack, speaker: str) -> None:
    done = ask("--source", speaker, "--recall-questions", "7")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "14 questions about 5 facts in 2 sequences of 100 tokens"
    assert [line.split()[0] for line in lines[2:5]] == ["source", "packed,", "packed,"]


def test_gates(ask: Kvpack) -> None:
    assert ask("--gate", "recall>=0,kv_bits<=32").code == 0
    done = ask("--gate", "recall>=1.1", "--kv", "decode", "--json")
    assert done.code == 1
    assert done.json["error"]["message"].startswith("decode: recall is ")
    assert ask("--gate", "kl<=1").code == 2


@pytest.mark.parametrize("arguments", [["--data", "x.txt"], ["--report", "x.html"], ["--task", "recal"]])
def test_options_of_the_other_task_are_refused(ask: Kvpack, arguments: list[str]) -> None:
    assert ask(*arguments).code == 2


def test_a_text_model_is_refused(call_kvpack: Kvpack, tiny_artifact: str) -> None:
    done = call_kvpack("eval", tiny_artifact, "--task", "recall", "--json")
    assert done.code == 2
    assert "not one of the recall task" in done.json["error"]["message"]
    assert Path(tiny_artifact).name in done.json["error"]["message"]
