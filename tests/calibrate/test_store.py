from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kvpack.calibrate.store import Calibration
from kvpack.core.errors import ArtifactError, CalibrationMismatch
from tests.calibrate.conftest import job_for
from tests.tiny_models import make_model


@pytest.fixture
def copy(done: Calibration, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done.path, tmp_path / "copy"))


def _change(path: Path, **fields) -> None:
    file = path / "calibration.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("calibration.seed=1", "seed"),
        ("calibration.samples=5", "samples"),
        ("calibration.sample_tokens=40", "sample_tokens"),
        ("calibration.sequential=false", "sequential"),
        ("weights.0.codec.bits=3", "weight parts"),
        ("weights.0.solver.damp=0.1", "weight parts"),
        ("kv_cache.key.transforms.1.heads=1", "kv_cache transforms"),
        ("kv_cache.value.fold=false", "kv_cache transforms"),
    ],
)
def test_a_calibration_for_something_else_is_refused_by_field(checkpoint, done, override, field):
    other = job_for(checkpoint("llama"), "rotatekv-w4", override)
    with pytest.raises(CalibrationMismatch, match=rf"other values of: {field} \("):
        done.matches(other.plan, other.hashes)


@pytest.mark.parametrize("override", ["kv_cache.tiers.old.codec.bits=4", "kv_cache.policy.top_values=10"])
def test_what_does_not_influence_it_is_not_compared(checkpoint, done, override):
    other = job_for(checkpoint("llama"), "rotatekv-w4", override)
    done.matches(other.plan, other.hashes, other.samples.tokens_sha256)


def test_another_model_or_text_is_refused(checkpoint, done, job, tmp_path):
    other = job_for(make_model(tmp_path / "m", "llama", seed=1), "rotatekv-w4")
    with pytest.raises(CalibrationMismatch, match=r"model files \("):
        done.matches(other.plan, other.hashes)
    with pytest.raises(CalibrationMismatch, match=r"calibration text \("):
        done.matches(job.plan, job.hashes, "0" * 64)
    (tmp_path / "a.txt").write_text("words " * 1000)
    other = job_for(checkpoint("llama"), "rotatekv-w4", f"calibration.data={tmp_path / 'a.txt'}")
    with pytest.raises(CalibrationMismatch, match=r"data \("):
        done.matches(other.plan, other.hashes)


def test_a_flipped_bit_is_noticed(copy):
    file = copy / "block-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    opened = Calibration.open(copy)
    opened.states(0, "key")
    with pytest.raises(ArtifactError, match="content changed"):
        opened.states(1, "key")
    with pytest.raises(ArtifactError, match="content changed"):
        opened.solved("model.layers.1.mlp.up_proj")


def test_incomplete_foreign_and_newer_folders(copy, tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        Calibration.open(tmp_path / "none")
    (copy / "block-00000.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ArtifactError, match=r"block-00000\.safetensors is missing"):
        Calibration.open(copy)
    (tmp_path / "kept").rename(copy / "block-00000.safetensors")
    _change(copy, version=2)
    with pytest.raises(ArtifactError, match="version 2"):
        Calibration.open(copy)
    _change(copy, version=1, linears={}, files={"../kept": "0"})
    with pytest.raises(ArtifactError, match="is missing"):
        Calibration.open(copy)
    _change(copy, files={}, linears={"a": {"file": "b"}})
    with pytest.raises(ArtifactError, match="describes 'a' wrongly"):
        Calibration.open(copy)
    _change(copy, files=[])
    with pytest.raises(ArtifactError, match="lacks 'files'"):
        Calibration.open(copy)
    _change(copy, format="other")
    with pytest.raises(ArtifactError, match="not a calibration"):
        Calibration.open(copy)


def test_layers_without_results(done):
    assert done.solved("lm_head") is None
    with pytest.raises(ArtifactError, match="layer 7 has no key transforms"):
        done.states(7, "key")
