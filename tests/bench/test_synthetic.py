"""Models of a stated shape: what is written is what transformers and kvpack read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpack.bench import synthetic
from kvpack.bench.prepare import synthetic_pair
from kvpack.bench.shapes import SHAPES, Shape, shape_of
from kvpack.bench.synthetic import synthesise
from kvpack.core.errors import RecipeError, ResourceError, UsageError
from kvpack.models import open_model

SMALL_QWEN = Shape("qwen3", 1, 32, 48, 4, 2, 8, 320, False, 1e6, 256, normed=True)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert SHAPES[name].nbytes == 2 * parameters


@pytest.mark.parametrize("shape", [shape_of("tiny", 1), SMALL_QWEN], ids=["llama", "qwen3"])
def test_transformers_and_kvpack_read_it(shape: Shape, tmp_path: Path) -> None:
    folder = synthesise(shape, tmp_path / "model")
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.rope_parameters["rope_theta"] == shape.rope_theta
    assert model.dtype == torch.bfloat16
    logits = model(input_ids=torch.arange(12)[None]).logits
    assert bool(logits.isfinite().all())
    spec = open_model(folder)
    assert (spec.hidden_size, spec.max_positions) == (shape.hidden, shape.positions)
    assert sum(t.nbytes for t in spec.tensors.values()) == shape.nbytes


def test_weights_are_seeded_and_scaled(tmp_path: Path) -> None:
    first, again, other = (
        synthesise(shape_of("tiny", 1), tmp_path / name, seed=seed) / "model.safetensors"
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    model = AutoModelForCausalLM.from_pretrained(first.parent, dtype="float32")
    down = model.model.layers[0].mlp.down_proj.weight
    assert float(down.detach().std()) * 128**0.5 == pytest.approx(1, rel=0.05)
    assert bool((model.model.norm.weight == 1).all())


def test_the_tokenizer_takes_any_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "naïve ⌘ text\n\t\x00 with \N{SNOWMAN}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert max(ids) < 259 <= json.loads((tiny_model / "config.json").read_text())["vocab_size"]


def test_a_model_that_is_there_is_used_again(tmp_path: Path) -> None:
    folder = synthesise(shape_of("tiny", 1), tmp_path / "model")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert synthesise(shape_of("tiny", 1), folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="holds something else already"):
        synthesise(shape_of("tiny", 1), folder, seed=1)


def test_a_full_disk_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ResourceError, match="are needed, 10 are free"):
        synthesise(shape_of("tiny", 1), tmp_path / "model")


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="no shape is called 'gpt-5'"):
        shape_of("gpt-5")


def test_a_calibrated_recipe_goes_through_the_pipeline(tmp_path: Path) -> None:
    small = ["calibration.samples=2", "calibration.sample_tokens=32"]
    with synthetic_pair(shape_of("tiny", 1), "w4", small, keep=tmp_path) as (source, artifact):
        assert (source / "model.safetensors").is_file()
        assert (artifact.name, (artifact / "kvpack.json").is_file()) == ("artifact-w4", True)
    assert artifact.is_dir()


def test_a_temporary_pair_is_gone_afterwards() -> None:
    with synthetic_pair(shape_of("tiny", 1), "rtn") as (source, artifact):
        assert source.is_dir()
        assert artifact.is_dir()
    assert not source.exists()
    assert not artifact.exists()


def test_a_wrong_recipe_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError), synthetic_pair(shape_of("tiny"), "rtm", keep=tmp_path / "kept"):
        pass
    assert not (tmp_path / "kept").exists()
