"""Spreads, gains, settings and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpack.bench import columns as module
from kvpack.bench.columns import Column, columns_of, fitted, needed_bytes
from kvpack.bench.machine import Watch
from kvpack.bench.result import Measure, Spread
from kvpack.bench.run import bench
from kvpack.bench.settings import Settings, contexts_of
from kvpack.core.access import CLOSED
from kvpack.core.errors import ArtifactError, ResourceError, SourceError, UsageError


def test_spread_has_quartiles_or_extremes() -> None:
    assert Spread.of([3.0]) == Spread(3, 3, 3, 3, 1)
    assert Spread.of([4.0, 1.0, 2.0]) == Spread(2, 1, 4, 7 / 3, 3)
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3, 2, 4, 3, 5)


def test_gains_pair_rounds_and_are_above_one_where_it_is_better() -> None:
    rounds = {"source": ((10.0,), (30.0,)), "artifact": ((5.0,), (10.0,))}
    less = Measure("step", "", "ms", rounds)
    more = Measure("decode", "", "tokens/s", rounds, rising=True)
    assert less.gain("artifact") == Spread(2.5, 2, 3, 2.5, 2)
    assert more.gain("artifact") == Spread.of([0.5, 1 / 3])
    assert less.gain("source") is None
    assert Measure("first_step", "", "ms", rounds, compared=False).gain("artifact") is None


def test_what_could_not_be_measured_has_no_spread_and_no_gain() -> None:
    found = Measure("kv_process", "", "bytes", {"source": ((),), "artifact": ((4.0,),)})
    assert found.spread("source") is None
    assert found.gain("artifact") is None
    assert Measure("x", "", "s", {"artifact": ((1.0,),)}).gain("artifact") is None


def test_medians_of_a_round_enter_the_gain() -> None:
    rounds = {"source": ((1.0, 2.0, 90.0),), "artifact": ((1.0, 1.0, 1.0),)}
    found = Measure("step", "", "ms", rounds).gain("artifact")
    assert found is not None
    assert found.median == 2


def test_contexts_are_read() -> None:
    assert contexts_of(["4096,512", "512", " 8 "]) == (8, 512, 4096)
    for wrong in ("0", "-3", "4k", "1.5", "²"):
        with pytest.raises(UsageError, match="cannot read the contexts"):
            contexts_of([wrong])


def test_defaults_fit_the_model() -> None:
    settings = Settings(repeat=5, steps=8)
    assert settings.fitted(0).contexts == settings.fitted(8192).contexts == (512, 4096)
    assert settings.fitted(1024).contexts == (512,)
    small = settings.fitted(256)
    assert (small.contexts, small.prompt_tokens) == ((128,), 224)
    assert settings.filled_by(2048) == "model"
    assert settings.filled_by(2049) == "auto"
    assert Settings(fill="random").filled_by(8) == "random"


@pytest.mark.parametrize("wrong", [{"fill": "half"}, {"dtype": "int8"}])
def test_unknown_choices_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="cannot be"):
        Settings(**wrong)


def test_columns_know_their_sizes(tiny_model: Path, tiny_packed: Path) -> None:
    source, packed, quantized = columns_of(tiny_packed, tiny_model, "quantized-cache", CLOSED)
    assert [c.name for c in (source, packed, quantized)] == ["source", "artifact", "quantized-cache"]
    assert source.weight_bytes == quantized.weight_bytes == packed.weight_bytes
    assert (source.positions, source.token_bytes) == (4096, 2 * 2 * 16 * 2)
    assert columns_of(tiny_packed, None, None, CLOSED) == (packed,)


def test_what_cannot_be_measured_is_refused(tiny_model: Path, tiny_packed: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a model folder"):
        columns_of(tiny_packed, tmp_path / "nothing", None, CLOSED)
    with pytest.raises(ArtifactError):
        columns_of(tiny_model, tiny_model, None, CLOSED)
    with pytest.raises(UsageError, match="needs --source"):
        columns_of(tiny_packed, None, "quantized-cache", CLOSED)
    with pytest.raises(UsageError, match="cannot be 'vllm'"):
        columns_of(tiny_packed, tiny_model, "vllm", CLOSED)


def test_contexts_need_positions() -> None:
    column = Column("source", "source", Path(), 0, 0, 1000)
    with pytest.raises(
        UsageError, match=r"context of 990 tokens and 42 steps need 1,032 positions"
    ) as caught:
        fitted([column], Settings(contexts=(10, 990)))
    assert "--context 958" in caught.value.hint
    with pytest.raises(UsageError, match="prompt of 990 and 32 new tokens"):
        fitted([column], Settings(contexts=(10,), prompt_tokens=990))


def test_models_must_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = (
        Column("source", "source", Path(), 10**9, 10**3, 0),
        Column("artifact", "artifact", Path(), 10**8, 0, 0),
    )
    settings = Settings(contexts=(1000,), prompt_tokens=1)
    needed = 10**9 + 10**6 + 10**8 + 2 * module.PROCESS_BYTES
    assert needed_bytes(columns, settings) == needed
    monkeypatch.setattr(module, "available_bytes", lambda: needed - 1)
    with pytest.raises(ResourceError, match=f"source, artifact need about {needed:,} bytes"):
        bench(columns, settings)


def test_the_machine_is_described() -> None:
    machine = Watch().machine()
    assert machine.cores >= 1
    assert machine.processor
    assert machine.versions.keys() >= {"kvpack", "python", "torch", "transformers", "numba"}
    assert machine.others is None or 0 <= machine.others <= 1
