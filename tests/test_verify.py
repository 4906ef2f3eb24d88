"""Proof that an artifact is what it should be, and that no kind of damage passes for sound."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvpack import pipeline
from kvpack.artifact.manifest import FileRecord
from kvpack.artifact.reader import Artifact
from kvpack.core.errors import SourceError
from kvpack.verify import Verification, verify
from tests.tiny_models import make_model

SMALL = ("calibration.samples=2", "calibration.sample_tokens=32", "calibration.batch=2")
PACKED = "model.layers.1.mlp.up_proj"
COPIED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("verify") / "source", max_position_embeddings=128)


@pytest.fixture(scope="module")
def sound(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated weights, folded values, an online key rotation with learned state."""
    path = tmp_path_factory.mktemp("verify") / "artifact"
    pipeline.export(pipeline.make_plan(source, "rotatekv-w4@4bit", SMALL), path)
    return path


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def outcome(found: Verification) -> dict[str, bool]:
    return {check.name: check.passed for check in found.checks}


def failure(found: Verification) -> str:
    """The text of the one failed check, which is the last that was made."""
    assert not found.passed
    assert [check.passed for check in found.checks].count(False) == 1
    assert not found.checks[-1].passed
    return found.checks[-1].detail


def test_a_sound_artifact_passes(sound: Path) -> None:
    found = verify(sound)
    assert found.passed
    assert outcome(found) == {"files": True, "decode": True, "logits": True}
    details = {check.name: check.detail for check in found.checks}
    assert "every checksum agrees" in details["files"]
    assert details["decode"].startswith("14 packed layers, largest relative error 0.")
    assert details["logits"].startswith("finite; perplexity ")


def test_a_sound_artifact_is_what_its_source_makes(sound: Path, source: Path) -> None:
    found = verify(sound, source)
    assert outcome(found) == {"files": True, "decode": True, "source": True, "logits": True}
    details = {check.name: check.detail for check in found.checks}
    copied = len(Artifact.open(sound).manifest.copied)
    assert details["source"] == f"{copied} copied tensors equal, 14 packed errors as recorded"
    assert details["logits"].startswith("KL ")


@pytest.mark.parametrize("recipe", ["w8", "kivi"])
def test_weights_alone_and_cache_alone_pass(source: Path, tmp_path: Path, recipe: str) -> None:
    pipeline.export(pipeline.make_plan(source, recipe), tmp_path / "out")
    assert verify(tmp_path / "out", source).passed


def test_every_stage_reports_its_end(sound: Path, source: Path) -> None:
    last: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        last[stage] = (done, total)

    verify(sound, source, progress=progress)
    assert last.keys() >= {"check", "decode", "compare", "evaluate"}
    assert all(done == total for done, total in last.values())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def place(artifact: Path, tensor: str) -> tuple[Path, int, int]:
    opened = Artifact.open(artifact, check="structure")
    file, entry = {**opened.places, **opened.kv_places}[tensor]
    return artifact / file, entry.start, entry.stop


@pytest.mark.parametrize("tensor", [f"{PACKED}.codes", f"{PACKED}.scale", COPIED, "layers.1.key.2.perm"])
def test_a_flipped_bit_names_file_and_tensor(artifact: Path, tensor: str) -> None:
    file, start, stop = place(artifact, tensor)
    flip(file, (start + stop) // 2)
    found = verify(artifact)
    assert outcome(found) == {"files": False}
    assert f"{file.name} is damaged: {tensor};" in failure(found)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md"])
def test_a_flipped_bit_in_any_other_file_names_it(artifact: Path, name: str) -> None:
    flip(artifact / name, 20)
    assert f"{name} is damaged" in failure(verify(artifact))


def test_a_missing_file_is_named(artifact: Path) -> None:
    shard = next(artifact.glob("kvpack-0*.safetensors"))
    shard.unlink()
    found = verify(artifact)
    assert outcome(found) == {"files": False}
    assert shard.name in failure(found)


def test_a_file_that_does_not_belong_is_named(artifact: Path) -> None:
    (artifact / "modeling_evil.py").write_text("print('hello')")
    assert "modeling_evil.py" in failure(verify(artifact))


def test_an_edited_manifest_is_noticed(artifact: Path) -> None:
    file = artifact / "kvpack.json"
    file.write_text(file.read_text().replace('"relative_error": 0.', '"relative_error": 1.', 1))
    found = verify(artifact)
    assert outcome(found) == {"files": False}
    assert "kvpack.json" in failure(found)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"layers": 3}, {"family": "qwen3"}],
    ids=["seed", "layers", "family"],
)
def test_another_source_is_noticed(sound: Path, tmp_path: Path, other: dict[str, object]) -> None:
    made = make_model(tmp_path / "other", max_position_embeddings=128, **other)
    found = verify(sound, made)
    assert outcome(found) == {"files": True, "decode": True, "source": False}
    assert "is not the checkpoint that was exported" in failure(found)


def test_another_source_is_noticed_even_where_the_recipe_does_not_fit_it(
    source: Path, tmp_path: Path
) -> None:
    plan = pipeline.make_plan(source, "w8", ["weights.0.match=layers.1.mlp.up_proj"])
    pipeline.export(plan, tmp_path / "out")
    short = make_model(tmp_path / "short", layers=1)
    assert "is not the checkpoint that was exported" in failure(verify(tmp_path / "out", short))


def test_a_source_that_is_none_is_an_error_and_no_answer(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        verify(sound, tmp_path)


def rehash(artifact: Path, tensor: str, change: Callable[[bytes], bytes]) -> None:
    """Change a weight tensor and every hash that tells: what someone would do who means to deceive."""
    manifest = Artifact.open(artifact).manifest
    file, start, stop = place(artifact, tensor)
    data = file.read_bytes()
    part = change(data[start:stop])
    file.write_bytes(data[:start] + part + data[stop:])
    sha256, whole = (hashlib.sha256(b).hexdigest() for b in (part, file.read_bytes()))
    files = {**manifest.files, file.name: FileRecord(len(data), whole)}
    if tensor in manifest.copied:
        record = replace(manifest.copied[tensor], sha256=sha256)
        manifest = replace(manifest, files=files, copied={**manifest.copied, tensor: record})
    else:
        linear, _, name = tensor.rpartition(".")
        packed = manifest.weights[linear]
        parts = {**packed.tensors, name: replace(packed.tensors[name], sha256=sha256)}
        weights = {**manifest.weights, linear: replace(packed, tensors=parts)}
        manifest = replace(manifest, files=files, weights=weights)
    (artifact / "kvpack.json").write_bytes(manifest.to_json())


@pytest.mark.parametrize(
    ("tensor", "where", "problem"),
    [(f"{PACKED}.codes", PACKED, "has relative error"), (COPIED, COPIED, "differs from the source")],
)
def test_consistent_forgery_needs_the_source_to_be_seen(
    artifact: Path, source: Path, tensor: str, where: str, problem: str
) -> None:
    rehash(artifact, tensor, lambda data: bytes(b ^ 1 for b in data))
    assert verify(artifact).passed, "nothing in the artifact itself is wrong"
    found = verify(artifact, source)
    assert outcome(found) == {"files": True, "decode": True, "source": False}
    assert failure(found).startswith(f"{where}: {problem}")


def test_scales_that_are_not_finite_are_noticed_without_the_source(artifact: Path) -> None:
    rehash(artifact, f"{PACKED}.scale", lambda data: b"\xff" * len(data))
    found = verify(artifact)
    assert outcome(found) == {"files": True, "decode": False}
    assert failure(found).startswith(f"{PACKED}: decodes to NaN or Inf")


def test_a_model_that_computes_nonsense_is_noticed(artifact: Path) -> None:
    rehash(artifact, COPIED, lambda data: b"\xff" * len(data))
    found = verify(artifact)
    assert outcome(found) == {"files": True, "decode": True, "logits": False}
    assert "NaN or Inf" in failure(found)
