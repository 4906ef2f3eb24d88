"""The main job on mixtures of experts, in both layouts of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpack import pipeline
from kvpack.core.errors import SourceError, UnsupportedModel
from kvpack.models import open_model
from kvpack.models.weights import SourceReader
from kvpack.runtime.linear import PackedLinear
from tests.recipes.checks import check_everything
from tests.recipes.conftest import Make, MakeSource
from tests.tiny_models import MOE_FAMILIES, make_model

STORED = {
    "mixtral": "model.layers.{}.block_sparse_moe.experts.{}.{}.weight",
    "qwen3_moe": "model.layers.{}.mlp.experts.{}.{}.weight",
}
SIDES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("recipe", ["w4", "w4@rtn", "kivi"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_family(family: str, recipe: str, make: Make, prompt: torch.Tensor) -> None:
    check_everything(make(recipe, family, cold_expert=3), prompt)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_both_layouts_give_the_same_artifact(family: str, make: Make) -> None:
    """Tensor for tensor: transformers saves experts one by one by default, and fused on request."""
    apart, fused = make("w4", family, cold_expert=3), make("w4", family, cold_expert=3, fused=True)
    assert load_file(apart.source / "model.safetensors").keys() == {
        tensor.stored_name or name for name, tensor in apart.plan.model.tensors.items()
    }
    assert any(tensor.stored_shape for tensor in fused.plan.model.tensors.values())
    assert fused.plan.model.parameters == apart.plan.model.parameters
    assert fused.plan.model.nbytes == apart.plan.model.nbytes
    first, second = apart.artifact, fused.artifact
    assert first.tensor_names == second.tensor_names
    for name in first.tensor_names:
        assert torch.equal(first.read(name), second.read(name)), name


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_projection_is_found(family: str, fused: bool, make_source: MakeSource) -> None:
    """Names and rows, against the layout that the family's authors published."""
    spec = open_model(make_source(family, cold_expert=3, fused=fused))
    reader = SourceReader.of(spec)
    published = load_file(make_source(family, cold_expert=3) / "model.safetensors")
    for layer in range(2):
        for expert in range(4):
            for ours, theirs in zip(("gate_proj", "up_proj", "down_proj"), SIDES[family], strict=True):
                found = reader.read(f"model.layers.{layer}.mlp.experts.{expert}.{ours}.weight")
                assert torch.equal(found, published[STORED[family].format(layer, expert, theirs)])
    roles = [x.role for x in spec.linears if ".experts." in x.name]
    assert [roles.count(role) for role in ("gate", "up", "down")] == [8, 8, 8]
    assert len(roles) == 24
    assert not [x.name for x in spec.linears if x.name.endswith("mlp.gate")], "routers stay as they are"
    assert "model.layers.0.mlp.gate.weight" in spec.tensors


def test_only_the_experts_that_tokens_choose_are_decoded(make: Make, prompt: torch.Tensor) -> None:
    model = make("w4@rtn", "mixtral", cold_expert=3).load()
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    model(prompt[:, :1], use_cache=False)
    chosen = {name.rpartition(".")[0] for name in ran if ".experts." in name}
    assert len(chosen) == 4, "two experts in each of two layers"
    assert not any(name.endswith(".3") for name in chosen)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("@mlp", 24),
        ("@gate", 8),
        ("experts.*.gate_proj", 8),
        ("model.layers.0.mlp.experts.{1,2}.*", 6),
        ("@linear", 32),
    ],
)
def test_patterns(pattern: str, count: int, make_source: MakeSource) -> None:
    source = make_source("qwen3_moe", cold_expert=3)
    plan = pipeline.make_plan(source, "w4", [f"weights.0.match={pattern}"])
    assert len(plan.weights) == count


def test_packing_a_part_of_the_experts(make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor) -> None:
    """Packed and plain experts stand side by side."""
    import kvpack

    small = ("calibration.samples=2", "calibration.sample_tokens=32")
    pattern = "weights.0.match=experts.{0,3}.down_proj"
    plan = pipeline.make_plan(make_source("mixtral", cold_expert=3), "w4", [pattern, *small])
    made = pipeline.export(plan, tmp_path / "out")
    assert made.manifest.calibration is not None
    assert made.manifest.calibration["experts"]["measured"] == 8
    with torch.inference_mode():
        assert bool(kvpack.load(tmp_path / "out")(prompt).logits.isfinite().all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, make: Make, prompt: torch.Tensor) -> None:
    check_everything(make("w4@rtn", "qwen3_moe", cold_expert=3, fused=True, dtype=dtype), prompt)


def test_dense_layers_between(make: Make, prompt: torch.Tensor) -> None:
    """A layer without experts in a model that has them."""
    made = make("w4@rtn", "qwen3_moe", decoder_sparse_step=2)
    names = [x.name for x in made.plan.model.linears if x.role == "gate"]
    assert names[0] == "model.layers.0.mlp.gate_proj"
    assert len(names) == 5
    check_everything(made, prompt)


def test_shards_may_part_the_experts(make: Make, prompt: torch.Tensor) -> None:
    made = make("w4@rtn", "mixtral", cold_expert=3, shard_size="100KB")
    assert len(made.plan.model.files) > 2
    check_everything(made, prompt)


def test_fused_experts_of_another_shape(make_source: MakeSource, tmp_path: Path) -> None:
    path = _copy(make_source("mixtral", cold_expert=3, fused=True), tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    save_file({**tensors, name: tensors[name][:3]}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"gate_up_proj is \[3, 192, 64\], config.json asks for \[4"):
        open_model(path)


def test_missing_and_surplus_experts(make_source: MakeSource, tmp_path: Path) -> None:
    path = _copy(make_source("mixtral", cold_expert=3), tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    gone = tensors.pop(name)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.experts\.2\.up_proj\.weight.*missing"):
        open_model(path)
    surplus = {**tensors, name: gone, name.replace(".2.w3", ".4.w3"): gone.clone()}
    save_file(surplus, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"experts\.4"):
        open_model(path)


def test_a_changed_fused_tensor_is_noticed(make_source: MakeSource, tmp_path: Path) -> None:
    path = _copy(make_source("mixtral", cold_expert=3, fused=True), tmp_path)
    spec = open_model(path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({**tensors, name: tensors[name].flatten()}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="changed since"):
        SourceReader.of(spec).read("model.layers.0.mlp.experts.1.down_proj.weight")


def _copy(source: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, folder / "source"))


def test_experts_that_stay_fused_are_named(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "gpt_oss", num_local_experts=4, sliding_window=24)
    plan = pipeline.make_plan(source, "w4@rtn")
    assert len(plan.weights) == 8
    assert any("4 tensors of experts stay as they are" in note for note in plan.notes), plan.notes
    assert not pipeline.make_plan(source, "fragments/measure").notes
