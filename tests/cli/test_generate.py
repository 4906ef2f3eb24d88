"""`kvpack generate`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import Kvpack, Run

PROMPT = "The quick brown fox jumps over the lazy dog. Pack my box."


@pytest.fixture
def generate(call_kvpack: Kvpack, tiny_artifact: str) -> Kvpack:
    def run(*arguments: str) -> Run:
        return call_kvpack("generate", tiny_artifact, "-p", PROMPT, "-n", "12", *arguments)

    return run


def test_the_text_and_nothing_else_is_printed(run_kvpack: Kvpack, tiny_artifact: str) -> None:
    done = run_kvpack(
        "generate", tiny_artifact, "--prompt", PROMPT, "--max-new-tokens", "8", OMP_NUM_THREADS="1"
    )
    assert done.code == 0
    assert done.out.startswith(PROMPT)
    assert len(done.out.rstrip("\n")) > len(PROMPT)
    assert done.err == ""


def test_greedy_text_is_always_the_same(generate: Kvpack) -> None:
    assert generate().out == generate("--seed", "3").out


def test_sampled_text_follows_the_seed(generate: Kvpack) -> None:
    texts = [generate("--sample", "--seed", seed, "--json").json["data"]["text"] for seed in "778"]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_json_and_stats_tell_the_size_of_the_cache(generate: Kvpack) -> None:
    data = generate("--json").json["data"]
    assert {"text", "tokens", "kv_bytes", "kv_bits_per_element"} <= data.keys()
    assert data["residency"] is None
    assert data["tokens"] == len(PROMPT) + 12
    elements = (data["tokens"] - 1) * 2 * 2 * 2 * 16
    assert data["kv_bits_per_element"] == pytest.approx(8 * data["kv_bytes"] / elements)
    assert data["kv_bits_per_element"] < 32
    last = generate("--stats").out.splitlines()[-1]
    assert re.fullmatch(rf"{data['tokens']} tokens; KV cache .*B, [\d.]+ bits per element", last)


def test_stats_without_a_scheme(call_kvpack: Kvpack, tiny_source: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert call_kvpack("export", tiny_source, "-r", "w8", "-o", out).code == 0
    done = call_kvpack("generate", out, "-p", "ab", "-n", "2", "--stats")
    assert done.out.splitlines()[-1] == "4 tokens; KV cache not compressed"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["-p", ""], 2, "the prompt is empty"),
        ([], 2, "--prompt"),
        (["-p", "x", "-n", "0"], 2, "--max-new-tokens"),
    ],
)
def test_wrong_use_is_refused(
    call_kvpack: Kvpack, tiny_artifact: str, arguments: list[str], code: int, text: str
) -> None:
    done = call_kvpack("generate", tiny_artifact, *arguments)
    assert done.code == code
    assert text in done.err
    assert done.out == ""


def test_a_folder_that_is_no_artifact(call_kvpack: Kvpack, tiny_source: str) -> None:
    done = call_kvpack("generate", tiny_source, "-p", "x", "--json")
    assert done.code == 4
    assert done.json["error"]["code"] == "E_ARTIFACT"


def test_limits_for_weights_in_memory_say_what_was_chosen(
    call_kvpack: Kvpack, tiny_source: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    assert call_kvpack("export", tiny_source, "-r", "lossless", "-o", out).code == 0
    planned = call_kvpack("plan", tiny_source, "-r", "lossless").out
    assert "before lossless coding of packed weights: byte_planes packers (zstd)" in planned
    assert re.search(r"lossless +.* for .*x, \d+ tensors coded", call_kvpack("inspect", out).out)
    done = call_kvpack("generate", out, "-p", "ab", "-n", "2", "--max-slowdown", "500%")
    assert re.search(r"weights in memory: .*B instead of .*B; \d of 2 layers stay losslessly coded", done.out)
    assert re.search(r"one token: [\d.]+ ms \([+-][\d.]+%\), predicted", done.out)
    data = call_kvpack("generate", out, "-p", "ab", "-n", "2", "--max-weight-memory", "1GB", "--json")
    assert data.json["data"]["residency"]["packed"] == []


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (("--max-slowdown", "fast"), "5% or 0.05"),
        (("--max-weight-memory", "much"), "4GB"),
        (("--max-slowdown", "5%"), "storage"),
        (("--max-slowdown", "5%", "--max-weight-memory", "1GB"), "one of them"),
    ],
)
def test_limits_that_make_no_sense_are_errors(generate: Kvpack, flags: tuple[str, ...], hint: str) -> None:
    done = generate(*flags)
    assert done.code == 2
    assert hint in done.err
