"""The main job on every family, source dtype, and layout of the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvpack
from kvpack import pipeline
from kvpack.core.errors import UsageError
from tests.recipes.checks import (
    check_accounting,
    check_bytes,
    check_cache,
    check_copied,
    check_everything,
    check_generation,
    check_loaded,
    check_logits,
    same_bits,
    source_tensors,
)
from tests.recipes.conftest import SMALL, Made, Make, MakeSource
from tests.tiny_models import FAMILIES

RECIPES = ("rotatekv", "kivi", "w4", "w4@rtn")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, recipe: str, make: Make, prompt: torch.Tensor) -> None:
    check_everything(make(recipe, family), prompt)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_half_precision_source(family: str, dtype: str, make: Make, prompt: torch.Tensor) -> None:
    made = make("rotatekv-w4", family, dtype=dtype)
    assert made.artifact.manifest.base_model.dtype == dtype
    assert {str(p.dtype) for p in made.load().parameters()} == {f"torch.{dtype}"}
    check_everything(made, prompt)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3_text"])
def test_tied_embeddings_are_stored_once(family: str, make: Make, prompt: torch.Tensor) -> None:
    made = make("rotatekv-w4", family, tied=True)
    assert "lm_head.weight" not in made.artifact.tensor_names
    assert made.artifact.manifest.base_model.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    model = made.load()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    check_everything(made, prompt)


def _rewritten(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an unsharded checkpoint with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_tied_checkpoint_that_holds_both(
    make_source: MakeSource, make: Make, tmp_path: Path, prompt: torch.Tensor
) -> None:
    names = ("lm_head.weight", "model.embed_tokens.weight")

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors[names[0]] = tensors[names[1]].clone()

    source = _rewritten(make_source("llama", tied=True), tmp_path / "source", double)
    plan = pipeline.make_plan(source, "w8")
    assert [(d.name, d.reason) for d in plan.dropped] == [(names[0], f"tied to {names[1]}, stored once")]
    made = Made(source, plan, pipeline.export(plan, tmp_path / "out").path)
    check_everything(made, prompt)
    once = make("w8", "llama", tied=True)
    assert made.artifact.manifest.totals == once.artifact.manifest.totals


def test_tied_checkpoint_that_holds_the_head_only(
    make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor
) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source = make_source("llama", tied=True)
    head_only = _rewritten(source, tmp_path / "source", rename)
    plan = pipeline.make_plan(head_only, "w8")
    made = Made(source, plan, pipeline.export(plan, tmp_path / "out").path)
    check_accounting(made)
    with torch.inference_mode():
        embedding = source_tensors(pipeline.make_plan(source, "w8"))["model.embed_tokens.weight"]
        model = made.load()
        assert same_bits(model.model.embed_tokens.weight, embedding)
        assert same_bits(model.lm_head.weight, embedding)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_shards_in_and_out(family: str, make: Make, prompt: torch.Tensor) -> None:
    whole = make("rotatekv-w4", family)
    made = make("rotatekv-w4", family, shard_size="60KB", shard_bytes=30_000)
    assert len(made.plan.model.files) > 2
    assert len(list(made.path.glob("kvpack-0*.safetensors"))) > 2
    check_everything(made, prompt)
    for name in whole.artifact.tensor_names:
        assert same_bits(made.artifact.read(name), whole.artifact.read(name)), name


def test_buffers_of_old_checkpoints_are_dropped_with_a_reason(
    make_source: MakeSource, tmp_path: Path
) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[buffer] = torch.ones(8)

    folder = _rewritten(make_source("llama"), tmp_path / "source", add)
    plan = pipeline.make_plan(folder, "kivi")
    assert [d.name for d in plan.dropped] == [buffer]
    made = Made(folder, plan, pipeline.export(plan, tmp_path / "out").path)
    check_accounting(made)
    check_loaded(made, made.load())


def test_computation_in_another_dtype(make: Make, prompt: torch.Tensor) -> None:
    made = make("rotatekv-w4")
    model = kvpack.load(made.path, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation.removeprefix("kvpack_") == "eager"
    for name in made.artifact.manifest.weights:
        stored = made.artifact.solution(name).tensors["scale"]
        assert same_bits(model.get_submodule(name).get_buffer("scale"), stored)
    with torch.inference_mode():
        half = model(prompt, use_cache=False).logits
        full = made.load()(prompt, use_cache=False).logits
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.05 * full.norm()


def _config_dtype(folder: Path, dtype: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_configuration_without_dtype(make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor) -> None:
    """The dtype is then the weights'; a packed artifact must not take that of its scales.

    In this family and cut, a scale is the first tensor that holds floating-point numbers.
    """
    source = tmp_path / "source"
    shutil.copytree(make_source("olmo2", dtype="bfloat16"), source)
    _config_dtype(source, None)
    plan = pipeline.make_plan(source, "rotatekv-w4", SMALL)
    made = Made(source, plan, pipeline.export(plan, tmp_path / "out", shard_bytes=30_000).path)
    assert made.load().dtype == torch.bfloat16
    check_everything(made, prompt)


def test_weights_of_another_dtype_than_the_model_runs_in(
    make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor
) -> None:
    """They are copied as they are stored, and cast when they are loaded, as transformers does."""
    source = tmp_path / "source"
    shutil.copytree(make_source("llama"), source)
    _config_dtype(source, "bfloat16")
    plan = pipeline.make_plan(source, "rotatekv-w4", SMALL)
    made = Made(source, plan, pipeline.export(plan, tmp_path / "out").path)
    model = made.load()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    check_bytes(made)
    check_copied(made)
    check_logits(made, model, prompt)
    check_cache(made, model, prompt)
    check_generation(made, model, prompt)


def test_a_packed_model_is_not_saved_by_transformers(make: Make, tmp_path: Path) -> None:
    with pytest.raises((UsageError, ValueError), match="kvpack"):
        make("w8").load().save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))
