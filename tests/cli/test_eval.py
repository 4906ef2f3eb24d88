"""`kvpack eval`, and its gates as CI would use them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Kvpack, Run

METRICS = {"ppl", "ppl_ratio", "kl", "top1", "weight_bits", "kv_bits"}


@pytest.fixture
def evaluate(call_kvpack: Kvpack, tiny_artifact: str, tmp_path: Path) -> Kvpack:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12)

    def run(*arguments: str) -> Run:
        small = ["--data", str(text), "--context", "96", "--max-tokens", "192", "--step", "16"]
        return call_kvpack("eval", tiny_artifact, *small, *arguments)

    return run


def test_json_beside_the_source(evaluate: Kvpack, tiny_source: str) -> None:
    data = evaluate("--source", tiny_source, "--json").json["data"]
    assert (data["text"], data["tokens"]) == ("text.txt", 2 * 95)
    assert (data["context_tokens"], data["step_tokens"]) == (96, 16)
    assert data["packed"].keys() == {"prefill", "decode"}
    for metrics in data["packed"].values():
        assert metrics.keys() == METRICS
        assert metrics["ppl_ratio"] == pytest.approx(metrics["ppl"] / data["source"]["perplexity"])
        assert metrics["kl"] > 0
        assert metrics["weight_bits"] == data["bits_per_weight"] == 32
        assert metrics["kv_bits"] == data["kv_bits_per_element"] < 32
    assert 0 < data["kv_bytes_per_token"] < 2 * 2 * 2 * 16 * 4


def test_text_puts_source_and_packed_side_by_side(evaluate: Kvpack, tiny_source: str) -> None:
    done = evaluate("--source", tiny_source)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "190 tokens of text.txt, chunks of 96"
    assert lines[1].split() == ["perplexity", "ratio", "KL", "top-1"]
    assert [line.split()[0] for line in lines[2:5]] == ["source", "packed,", "packed,"]
    assert "bits per element" in lines[-1]


def test_without_a_source_nothing_is_compared(evaluate: Kvpack) -> None:
    data = evaluate("--kv", "decode", "--json").json["data"]
    assert data["source"] is None
    assert data["packed"].keys() == {"decode"}
    assert data["packed"]["decode"].keys() == {"ppl", "weight_bits", "kv_bits"}


def test_gates_that_hold(evaluate: Kvpack, tiny_source: str) -> None:
    assert evaluate("--source", tiny_source, "--gate", "kl<=100, top1>=0, kv_bits<=32").code == 0


def test_a_missed_gate_exits_with_one_and_still_tells_everything(evaluate: Kvpack, tiny_source: str) -> None:
    done = evaluate("--source", tiny_source, "--gate", "kl<=1e-9,ppl<=1e9", "--kv", "decode", "--json")
    assert done.code == 1
    assert done.json["data"]["packed"]["decode"]["kl"] > 1e-9
    assert done.json["error"]["code"] == "E_CHECK"
    assert done.json["error"]["message"].startswith("decode: kl is ")
    text = evaluate("--source", tiny_source, "--gate", "kl<=1e-9", "--kv", "decode")
    assert text.code == 1
    assert "perplexity" in text.out
    assert text.err.splitlines()[-2].startswith("error: decode: kl is ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gate", "kl<0.1"], "cannot read the gate 'kl<0.1'"),
        (["--gate", ""], "the gate is empty"),
        (["--gate", "kl<=0.1"], "add --source MODEL"),
        (["--kv", "sideways"], "use both, prefill or decode"),
        (["--data", "nothing.txt"], "does not exist"),
        (["--data", "builtin:moon"], "builtin:stdlib"),
        (["--context", "1"], "--context"),
    ],
)
def test_wrong_use_is_refused(evaluate: Kvpack, arguments: list[str], text: str) -> None:
    done = evaluate(*arguments)
    assert done.code == 2
    assert text in done.err
    assert done.out == ""
