"""`kvpack inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvpack.artifact.manifest import (
    BaseModel,
    FileRecord,
    Manifest,
    PackedLinear,
    RecipeRecord,
    TensorRecord,
    Totals,
    bits_per_element,
)
from kvpack.core.data_files import data_dir
from kvpack.pipeline import make_plan
from kvpack.report import weight_bytes
from tests.cli.conftest import Kvpack
from tests.cli.test_contract import HEAVY


def test_model(run_kvpack: Kvpack, demo_model: str) -> None:
    data = run_kvpack("inspect", demo_model, "--json").json["data"]
    assert data["type"] == "model"
    assert data["architecture"] == "LlamaForCausalLM"
    assert data["bytes_by_dtype"] == {"bfloat16": data["bytes"]}
    assert data["bytes"] == 2 * data["parameters"]


def test_looking_needs_no_torch(run_kvpack: Kvpack, demo_model: str) -> None:
    done = run_kvpack("inspect", demo_model, code=HEAVY)
    assert "LlamaForCausalLM" in done.out
    assert done.err.endswith("LOADED []")


@pytest.fixture(scope="module")
def manifest_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A manifest as an export of the demo model would write it, with made-up hashes."""
    plan = make_plan(data_dir("calibration") / "demo_model", "rotatekv-w4@4bit")
    record = {"sha256": "0" * 64}
    weights = {
        name: PackedLinear(
            w.linear.role, w.linear.shape, "bfloat16", w.codec, w.solver,
            {n: TensorRecord(t.shape, t.dtype, **record) for n, t in w.tensors.items()},
            bits_per_element(w.nbytes, w.linear.shape[0] * w.linear.shape[1]), 4, w.linear.layer, 0.08,
        )
        for name, w in plan.weights.items()
    }  # fmt: skip
    copied = {n: TensorRecord(t.shape, t.dtype, **record) for n, t in plan.copied.items()}
    total = weight_bytes(plan).total
    manifest = Manifest(
        BaseModel("LlamaForCausalLM", "llama", "bfloat16", plan.model.parameters, {}, {}),
        RecipeRecord("rotatekv-w4", "rotatekv-w4.yaml", "", plan.recipe.sha256, (), "4bit"),
        plan.recipe.resolved, weights, copied, plan.dropped, plan.kv, {},
        Totals(total, 0, bits_per_element(total, plan.model.parameters)),
        {"model.safetensors": FileRecord(total, "0" * 64)}, None, 0, {}, "0.1.0",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "kvpack.json").write_bytes(manifest.to_json())
    return str(folder)


def test_artifact(call_kvpack: Kvpack, manifest_folder: str) -> None:
    data = call_kvpack("inspect", manifest_folder, "--json").json["data"]
    assert data["type"] == "artifact"
    assert data["recipe"]["variant"] == "4bit"
    assert data["kv"]["key"]["codecs"][0]["bits"] == 4
    assert [t["kind"] for t in data["kv"]["key"]["transforms"]] == ["unrope", "hadamard", "channel_reorder"]
    (packed,) = data["weights"]
    assert packed["tensors"] == 42
    assert packed["worst_relative_error"] == 0.08
    (read,) = data["kv"]["reading"]
    why = "keys: Unrope has no partner for queries"
    assert read == {"layers": data["kv"]["layers"], "key": "rows", "value": "codes", "why": why}
    text = call_kvpack("inspect", manifest_folder).out
    assert "rotatekv-w4@4bit" in text
    assert f"because          {why}" in text
    assert "hadamard heads 1 (folded) > affine bits 4" in text


def test_looking_at_an_artifact_needs_no_torch(run_kvpack: Kvpack, manifest_folder: str) -> None:
    done = run_kvpack("inspect", manifest_folder, code=HEAVY)
    assert done.code == 0
    assert done.err.endswith("LOADED []")


def test_an_edited_manifest_is_refused(call_kvpack: Kvpack, manifest_folder: str, tmp_path: Path) -> None:
    text = Path(manifest_folder, "kvpack.json").read_text()
    (tmp_path / "kvpack.json").write_text(text.replace('"rotatekv-w4"', '"rotatekv-w5"'))
    done = call_kvpack("inspect", str(tmp_path), "--json")
    assert done.code == 4
    assert done.json["error"]["code"] == "E_ARTIFACT"


def test_calibration(call_kvpack: Kvpack, tmp_path: Path) -> None:
    content = {
        "format": "kvpack-calibration", "version": 1, "identity": {"data": "builtin:stdlib"},
        "data": {"sha256": "0" * 64}, "tokens": 65536, "versions": {"kvpack": "0.1.0"},
        "linears": {"a": {}}, "kv": {"0": {}, "1": {}}, "files": {"block-00000.safetensors": "0" * 64},
    }  # fmt: skip
    (tmp_path / "block-00000.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    data = call_kvpack("inspect", str(tmp_path), "--json").json["data"]
    assert (data["type"], data["tokens"], data["bytes"]) == ("calibration", 65536, 10)
    assert (data["solved_layers"], data["kv_layers"]) == (1, 2)
    (tmp_path / "block-00000.safetensors").unlink()
    assert call_kvpack("inspect", str(tmp_path)).code == 4


def test_other_folders_are_refused(run_kvpack: Kvpack, tmp_path: Path) -> None:
    done = run_kvpack("inspect", str(tmp_path))
    assert done.code == 4
    assert "neither a model, nor a calibration, nor an artifact" in done.err
