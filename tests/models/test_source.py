from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpack.core.errors import SourceError, UnsupportedModel
from kvpack.models import open_model
from kvpack.models.scan import scan
from kvpack.models.source import read_checkpoint, resolve
from kvpack.models.weights import SourceReader
from tests.tiny_models import make_model


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = make_model(tmp_path / "sharded", "llama", shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def _index(path: Path) -> dict:
    return json.loads((path / "model.safetensors.index.json").read_text())


def _write_index(path: Path, index: dict) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _edit(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_sharded_and_single_are_the_same_model(sharded, checkpoint):
    one, many = open_model(checkpoint("llama")), open_model(sharded)
    assert len(many.files) > 2
    assert one.files == ("model.safetensors",)
    assert one.parameters == many.parameters
    a, b = SourceReader.of(one), SourceReader.of(many)
    for name in one.tensors:
        assert torch.equal(a.read(name), b.read(name))


def test_a_tied_name_reads_the_tensor_that_holds_its_data(tmp_path):
    spec = open_model(make_model(tmp_path, "llama", tied=True))
    assert spec.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    reader = SourceReader.of(spec)
    assert torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight"))


def test_a_tensor_that_changed_after_opening_is_noticed(tmp_path):
    path = make_model(tmp_path, "llama")
    spec = open_model(path)
    _edit(path, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(SourceError, match=r"model\.norm\.weight.*changed"):
        SourceReader.of(spec).read("model.norm.weight")


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.0])
def test_truncated_shard(sharded, keep):
    file = sorted(sharded.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(SourceError, match=file.name):
        open_model(sharded)


def test_missing_shard(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(SourceError, match=rf"{file.name} is missing"):
        open_model(sharded)


def test_index_lists_a_tensor_that_its_shard_lacks(sharded):
    index = _index(sharded)
    index["weight_map"]["model.extra.weight"] = sorted(set(index["weight_map"].values()))[0]
    _write_index(sharded, index)
    with pytest.raises(SourceError, match=r"model\.extra\.weight"):
        read_checkpoint(sharded)


def test_index_does_not_list_a_tensor(sharded):
    index = _index(sharded)
    del index["weight_map"]["model.norm.weight"]
    _write_index(sharded, index)
    with pytest.raises(SourceError, match=r"does not list 'model\.norm\.weight'"):
        read_checkpoint(sharded)


def test_index_points_outside_the_folder(sharded):
    index = _index(sharded)
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    _write_index(sharded, index)
    with pytest.raises(SourceError, match="not a file of this folder"):
        read_checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match="index"):
        read_checkpoint(sharded)


def test_pickles_are_refused(tmp_path, checkpoint):
    path = _copy(checkpoint("llama"), tmp_path / "m")
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickled") as info:
        open_model(path)
    assert "save_pretrained" in info.value.hint


def test_no_weights_no_config_no_folder(tmp_path, checkpoint):
    path = _copy(checkpoint("llama"), tmp_path / "m")
    (path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="neither"):
        open_model(path)
    (path / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json is missing"):
        open_model(path)
    with pytest.raises(SourceError, match="not a model folder"):
        open_model(tmp_path / "m" / "tokenizer.json")


def test_hub_id_that_is_not_cached_needs_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for reference in ("nobody/nothing", "nobody/nothing@0123abc"):
        with pytest.raises(SourceError, match="local hub cache") as info:
            resolve(reference)
        assert "--allow-download" in info.value.hint


def test_cached_snapshot_is_found_offline_by_revision(tmp_path, monkeypatch, checkpoint):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny"
    snapshot = _copy(checkpoint("llama"), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve("someone/tiny") == (snapshot, commit)
    spec = open_model(f"someone/tiny@{commit}")
    assert (spec.revision, spec.family) == (commit, "llama")


def test_scan_hashes_every_file(sharded):
    spec = open_model(sharded)
    hashes = scan(spec)
    assert hashes == {f: hashlib.sha256((sharded / f).read_bytes()).hexdigest() for f in spec.files}


def test_scan_reports_progress(sharded):
    seen = []
    spec = open_model(sharded)
    scan(spec, lambda stage, done, total, detail="": seen.append((stage, done, total)))
    assert seen[-1] == ("check", len(spec.files), len(spec.files))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scan_names_the_tensor_and_place_of_nan_and_inf(tmp_path, value, dtype):
    path = make_model(tmp_path, "llama", dtype=dtype, tied=True)
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name].view(-1)[[70, 71, 900]] = value

    _edit(path, spoil)
    with pytest.raises(SourceError, match=rf"{name} holds 3 NaN or Inf.*index 70") as info:
        scan(open_model(path))
    assert "model.safetensors" in info.value.where


def test_scan_finds_nan_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("kvpack.models.scan.CHUNK_BYTES", 64)
    path = make_model(tmp_path, "llama")
    clean = scan(open_model(path))
    assert clean == {
        "model.safetensors": hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    }
    _edit(path, lambda t: t["model.norm.weight"].__setitem__(40, float("nan")))
    with pytest.raises(SourceError, match=r"model\.norm\.weight holds 1 .*index 40"):
        scan(open_model(path))
