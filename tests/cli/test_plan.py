"""`kvpack plan`: numbers that can be worked out by hand for the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Kvpack


def test_sizes_of_kivi(call_kvpack: Kvpack, demo_model: str) -> None:
    data = call_kvpack("plan", demo_model, "-r", "kivi", "--context", "4096", "--json").json["data"]
    config = json.loads(Path(demo_model, "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    numbers = 2 * layers * heads * config["head_dim"]
    cache = data["kv_cache"]
    assert cache["source_bytes_per_token"] == 2 * numbers
    assert cache["bytes_per_token"] == numbers * 3 / 8, "2 bits, and 32 bits of scale and zero per 32 numbers"
    assert cache["source_bytes"] == 4096 * 2 * numbers
    assert data["artifact"]["bytes"] == data["source_bytes"], "kivi leaves the weights alone"


def test_rows_add_up(call_kvpack: Kvpack, demo_model: str) -> None:
    data = call_kvpack("plan", demo_model, "-r", "w4", "--json").json["data"]
    assert sum(row["bytes"] for row in data["weights"]) == data["artifact"]["bytes"]
    assert data["weights"][0]["match"] == "@linear"
    assert 4 < data["weights"][0]["bits_per_element"] < 4.3
    assert data["kv_cache"] is None


def test_text_shows_scheme_and_sizes(call_kvpack: Kvpack, demo_model: str) -> None:
    done = call_kvpack("plan", demo_model, "--recipe", "rotatekv-w4@4bit")
    assert done.code == 0
    assert "affine bits 4, group channel/128" in done.out
    assert "unrope > hadamard heads 4 > channel_reorder > affine bits 4" in done.out
    assert "hadamard heads 1 (folded) > affine" in done.out
    assert not any(line != line.rstrip() for line in done.out.splitlines())


@pytest.mark.parametrize(
    ("recipe", "key", "value", "why"),
    [
        ("kivi", "codes", "codes", None),
        ("fp8", "codes", "codes", None),
        (
            "kvquant",
            "rows",
            "rows",
            "keys: Unrope has no partner for queries; values: MergeHeads mixes heads",
        ),
        ("gear", "blocks", "codes", "keys: Residual codes are decoded"),
        ("zipcache", "dense", "dense", "tokens are ranked by importance"),
    ],
)
def test_how_attention_reads(
    call_kvpack: Kvpack, demo_model: str, recipe: str, key: str, value: str, why: str | None
) -> None:
    data = call_kvpack("plan", demo_model, "-r", recipe, "--json").json["data"]
    (read,) = data["kv_cache"]["reading"]
    assert (read["key"], read["value"], read["why"]) == (key, value, why)
    assert read["layers"] == data["kv_cache"]["layers"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["-r", "w4", "--set", "weights.0.match=mlp.gate"], 2, "no linear layer of LlamaForCausalLM matches"),
        (["-r", "w4", "--set", "weights.0.codec.bits=9"], 2, "out of range"),
        ([], 2, "--recipe"),
    ],
)
def test_refusals(call_kvpack: Kvpack, demo_model: str, arguments: list[str], code: int, text: str) -> None:
    done = call_kvpack("plan", demo_model, *arguments)
    assert done.code == code
    assert text in done.err
    assert done.out == ""


def test_an_unusable_model_is_an_input_error(call_kvpack: Kvpack, tmp_path: Path) -> None:
    assert call_kvpack("plan", str(tmp_path), "-r", "kivi").code == 4
