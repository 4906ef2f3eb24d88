"""What one process measures, here in this one; no test says how long anything takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvpack import pipeline
from kvpack.bench.measuring import Measuring, answer
from kvpack.core.errors import KvpackError, UsageError


def begun(kind: str, path: Path, dtype: str = "auto") -> Measuring:
    measuring = Measuring(kind, str(path), dtype, False, 0)
    told = answer(measuring, {"do": "load"})
    assert told["seconds"] >= told["load_seconds"] > 0
    return measuring


@pytest.mark.parametrize(
    ("kind", "cache"),
    [("source", "DynamicCache"), ("artifact", "KVPackCache"), ("quantized-fp8", "QuantizedCache")],
)
def test_every_kind_of_column(kind: str, cache: str, tiny_model: Path, tiny_packed: Path) -> None:
    measuring = begun(kind, tiny_packed if kind == "artifact" else tiny_model)
    assert type(measuring.cache).__name__ == cache
    told = measuring.prompt(40, 3)
    assert told["prefill"] > 0
    assert told["decode"] > 0
    assert measuring.cache.get_seq_length() == 43
    held = {how: measuring.fill(100, how)["held_bytes"] for how in ("model", "random")}
    assert held["model"] == held["random"]
    assert measuring.cache.get_seq_length() == 102
    assert len(measuring.steps(4)["seconds"]) == 4
    assert measuring.cache.get_seq_length() == 106


def test_held_bytes_are_those_of_the_tensors(tiny_model: Path) -> None:
    elements = 2 * 2 * 100 * 16  # keys and values, heads, tokens, channels
    assert begun("source", tiny_model).fill(100, "auto")["held_bytes"] == 2 * elements
    scales = 2 * 4
    assert begun("quantized-fp8", tiny_model).fill(100, "auto")["held_bytes"] == elements + scales


def test_chunks_of_a_random_fill_add_up(tiny_packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpack.bench.fill.CHUNK", 48)
    measuring = begun("artifact", tiny_packed)
    told = measuring.fill(100, "auto")
    assert told["filled"] == "random"
    assert measuring.cache.get_seq_length() == 102
    assert measuring.cache.track.positions.tolist() == [list(range(102))]


SINKS = "kv_cache.policy={kind: sink_detect, recent_tokens: 32, inside: recent, outside: old}"


@pytest.mark.parametrize(("recipe", "overrides"), [("kivi", [SINKS]), ("zipcache", []), ("xquant", [])])
def test_caches_that_look_further(
    recipe: str, overrides: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    pipeline.export(pipeline.make_plan(tiny_model, recipe, overrides), tmp_path / "out")
    measuring = begun("artifact", tmp_path / "out")
    # Hidden states can be made up beside keys and values; queries, and inputs that lead to keys, cannot.
    random = recipe == "kivi"
    assert measuring.fill(80, "auto")["filled"] == ("random" if random else "model")
    assert measuring.cache.get_seq_length() == 82
    if not random:
        with pytest.raises(UsageError, match="cannot be filled with random"):
            measuring.fill(80, "random")


def test_the_dtype_holds_for_source_and_artifact(tiny_model: Path, tiny_packed: Path) -> None:
    assert begun("source", tiny_model, "float32").model.dtype == torch.float32
    assert begun("artifact", tiny_packed, "float32").model.dtype == torch.float32


def test_unknown_measurements_are_refused(tiny_model: Path) -> None:
    with pytest.raises(KvpackError, match="knows no measurement 'dance'"):
        answer(Measuring("source", str(tiny_model), "auto", False, 0), {"do": "dance"})
