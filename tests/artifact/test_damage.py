import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpack.artifact import manifest as m
from kvpack.artifact.reader import Artifact, read_manifest
from kvpack.core.errors import ArtifactError
from kvpack.core.model_spec import AttentionSpec, Projection
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plan import DroppedTensor
from kvpack.recipe.plane_plan import PlanePlan
from tests.artifact.conftest import snapshot

Edit = Callable[[dict[str, Any]], None]


def forge(folder: Path, edit: Edit) -> None:
    """Edit the manifest and give it a digest that fits, as an attacker would."""
    path = folder / "kvpack.json"
    content = json.loads(path.read_bytes())
    edit(content)
    write_forged(path, json.dumps(content).encode())


def write_forged(path: Path, data: bytes) -> None:
    start = data.index(b'"manifest_sha256": "') + len(b'"manifest_sha256": "')
    blank = data[:start] + b"0" * 64 + data[start + 64 :]
    digest = hashlib.sha256(blank).hexdigest().encode()
    path.write_bytes(data[:start] + digest + data[start + 64 :])


def refresh(folder: Path, name: str) -> None:
    """Give a changed file the size and hash in the manifest that it now has."""
    data = (folder / name).read_bytes()
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(folder, lambda content: content["files"].update({name: record}))


def test_the_forger_is_good_enough(artifact: Path) -> None:
    forge(artifact, lambda content: None)
    Artifact.open(artifact)


def test_one_flipped_bit_in_any_byte_of_any_file_is_found(artifact: Path) -> None:
    for name, data in snapshot(artifact).items():
        path = artifact / name
        with path.open("r+b", buffering=0) as stream:
            for position, byte in enumerate(data):
                stream.seek(position)
                stream.write(bytes([byte ^ (1 << position % 8)]))
                with pytest.raises(ArtifactError) as caught:
                    Artifact.open(artifact)
                assert name in str(caught.value), f"{name} byte {position}: {caught.value}"
                stream.seek(position)
                stream.write(bytes([byte]))
    Artifact.open(artifact)


def test_any_file_cut_anywhere_is_refused_without_hashing(artifact: Path) -> None:
    for name, data in snapshot(artifact).items():
        path = artifact / name
        for cut in range(len(data) - 1, -1, -1):
            os.truncate(path, cut)
            with pytest.raises(ArtifactError):
                Artifact.open(artifact, "structure")
        path.write_bytes(data + b"\n")
        with pytest.raises(ArtifactError):
            Artifact.open(artifact, "structure")
        path.write_bytes(data)
    Artifact.open(artifact)


def test_damage_names_the_shard_and_the_tensor_and_counts_the_others(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    file, entry = opened.places["blocks.0.down.codes"]
    data = bytearray((artifact / file).read_bytes())
    data[entry.start] ^= 1
    (artifact / file).write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(artifact)
    assert f"{file} is damaged: blocks.0.down.codes; the other 7 tensors are not affected" in str(
        caught.value
    )
    Artifact.open(artifact, "structure")


def test_a_missing_file_and_an_added_one(artifact: Path) -> None:
    for name in snapshot(artifact):
        (artifact / name).rename(artifact.parent / "aside")
        with pytest.raises(ArtifactError, match=f"{name}"):
            Artifact.open(artifact)
        (artifact.parent / "aside").rename(artifact / name)
    (artifact / ".gitattributes").write_text("x")
    (artifact / ".cache").mkdir()
    (artifact / ".cache" / "x").write_text("x")
    (artifact / "model.sig").write_text("signature")
    Artifact.open(artifact)
    (artifact / "sub").mkdir()
    (artifact / "sub" / "model.safetensors").write_text("x")
    with pytest.raises(ArtifactError, match=r"sub/model\.safetensors is not in the manifest"):
        Artifact.open(artifact)


def test_no_manifest_no_artifact(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ArtifactError, match=r"holds no kvpack\.json"):
            read_manifest(folder)


def test_a_newer_format_says_upgrade(artifact: Path) -> None:
    def newer(content: dict[str, Any]) -> None:
        content.update(format_version=2, kvpack_version="9.0", invented={})
        del content["weights"]

    forge(artifact, newer)
    with pytest.raises(ArtifactError, match=r"format version 2, written by kvpack 9\.0") as caught:
        Artifact.open(artifact)
    assert "pip install -U kvpack" in str(caught.value)


NAMES = [
    "../out/README.md",
    "/etc/hostname",
    "a/../README.md",
    "./README.md",
    "a//b",
    "",
    ".hidden",
    "C:\\x",
    "a\\b",
    "nul\0",
    "new\nline",
    "e\u0301",
    "x" * 300,
    "right\u202eleft",
    "trailing.",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_the_folder_or_deceive(artifact: Path, name: str) -> None:
    forge(artifact, lambda content: content["files"].update({name: content["files"].pop("README.md")}))
    (artifact / "README.md").unlink()
    with pytest.raises(ArtifactError, match="is not a file name that an artifact may have"):
        Artifact.open(artifact, "structure")


@pytest.mark.parametrize("name", ["README.md", "kvpack-kv.safetensors", "kvpack.json"])
def test_links_are_refused(artifact: Path, name: str) -> None:
    outside = artifact.parent / "outside"
    (artifact / name).rename(outside)
    (artifact / name).symlink_to(outside)
    with pytest.raises(ArtifactError, match=f"{name} is a symbolic link"):
        Artifact.open(artifact)


def test_linked_folders_are_not_followed(artifact: Path) -> None:
    (artifact.parent / "elsewhere").mkdir()
    (artifact / "sub").symlink_to(artifact.parent / "elsewhere")
    with pytest.raises(ArtifactError, match="sub is not in the manifest"):
        Artifact.open(artifact)


def test_the_whole_artifact_may_be_reached_by_a_link(artifact: Path) -> None:
    link = artifact.parent / "link"
    link.symlink_to(artifact)
    Artifact.open(link)


def test_a_snapshot_of_the_hub_cache_is_read_and_nothing_beyond_it(artifact: Path) -> None:
    blobs = artifact.parent / "models--a--b" / "blobs"
    snapshot_folder = blobs.parent / "snapshots" / "0123"
    snapshot_folder.mkdir(parents=True)
    blobs.mkdir()
    for file in artifact.iterdir():
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot_folder / file.name).symlink_to(Path("../../blobs") / f"hash-{file.name}")
    Artifact.open(snapshot_folder)
    (snapshot_folder / "README.md").unlink()
    (snapshot_folder / "README.md").symlink_to(artifact / "README.md")
    with pytest.raises(ArtifactError, match=r"README\.md is a symbolic link"):
        Artifact.open(snapshot_folder)


def at(*path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def walk(content: dict[str, Any]) -> dict[str, Any]:
        for key in path:
            content = content[int(key) if isinstance(content, list) else key]
        return content

    return walk


UP = at("weights", "blocks.0.up")
LIES: dict[str, tuple[Edit, str]] = {
    "unknown key": (lambda c: c.update(extra=1), "extra: unknown key"),
    "missing key": (lambda c: c.pop("kv"), "kv: missing"),
    "missing inner key": (lambda c: c["base_model"].pop("family"), "base_model.family: missing"),
    "unknown inner key": (lambda c: UP(c).update(x=1), "weights.blocks.0.up.x: unknown key"),
    "text for a number": (lambda c: c.update(seed="0"), "seed: expected a whole number"),
    "true for a number": (lambda c: c.update(seed=True), "seed: expected a whole number"),
    "list for a mapping": (lambda c: c.update(files=[]), "files: expected a mapping"),
    "list for plain data": (lambda c: c.update(resolved_recipe=[]), "resolved_recipe: expected a mapping"),
    "unknown codec": (lambda c: UP(c)["codec"].update(kind="magic"), "no codec is called 'magic'"),
    "codec from elsewhere": (lambda c: UP(c)["codec"].update(kind="../x"), "no codec is called"),
    "impossible bits": (lambda c: UP(c)["codec"].update(bits=99), "99 is out of range"),
    "other bits": (lambda c: UP(c)["codec"].update(bits=4), "weights.blocks.0.up.bits"),
    "other layout": (lambda c: UP(c)["codec"].update(zero="none"), "not those of its codec"),
    "rows that do not divide": (
        lambda c: UP(c)["codec"].update(group={"axis": "token", "size": 5}),
        "cannot be split",
    ),
    "other shape": (lambda c: UP(c).update(shape=[5, 24]), "not those of its codec"),
    "prettier bits": (lambda c: UP(c).update(bits_per_element=3.0), "come to"),
    "prettier totals": (lambda c: c["totals"].update(bits_per_weight=0.1), "come to"),
    "unlisted tensor": (lambda c: c["copied"].clear(), "totals"),
    "tensor of another shape": (
        lambda c: at("copied", "norm.weight")(c).update(shape=[1, 7]),
        r"'norm.weight' is bfloat16 \(7,\), the manifest says bfloat16 \(1, 7\)",
    ),
    "tensor of another dtype": (
        lambda c: at("copied", "norm.weight")(c).update(dtype="float16"),
        "'norm.weight' is bfloat16",
    ),
    "renamed tensor": (
        lambda c: c["copied"].update({"other": c["copied"].pop("norm.weight")}),
        "'other' is in the manifest and in no file",
    ),
    "negative shape": (
        lambda c: at("copied", "norm.weight")(c).update(shape=[-1, -7]),
        r"copied.norm.weight: impossible shape",
    ),
    "one dimension": (lambda c: UP(c).update(shape=[120]), "shape: expected 2 entries, got 1"),
    "minus times minus": (lambda c: UP(c).update(shape=[-6, -20]), "impossible shape"),
    "unknown dtype": (lambda c: at("copied", "norm.weight")(c).update(dtype="int3"), "int3"),
    "state of another shape": (
        lambda c: at("kv", "0", "key", "states", "0", "perm")(c).update(shape=[4, 2]),
        r"kv.0: key.states",
    ),
    "state for no transform": (lambda c: at("kv", "0", "key")(c).update(states=[]), r"kv.0: key.states"),
    "no heads": (lambda c: at("kv", "0", "attention")(c).update(kv_heads=0), r"kv.0: impossible"),
    "no KV layer for a state": (lambda c: c.update(kv=[]), "kv_state"),
    "missing shard": (
        lambda c: c["files"].pop("kvpack-00001-of-00002.safetensors"),
        "kvpack-00001-of-00002.safetensors is not in the manifest",
    ),
}


@pytest.mark.parametrize(("edit", "message"), LIES.values(), ids=LIES.keys())
def test_a_manifest_that_lies_consistently_is_refused(artifact: Path, edit: Edit, message: str) -> None:
    forge(artifact, edit)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(artifact)


JSON = st.recursive(
    st.sampled_from([None, True, -1, 0, 3, 2**70, 0.5, "", "\0", "float32", "../x", "affine"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["kind", "x"]), inner),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON tree with every key of it."""
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, 10**6), value=JSON, remove=st.booleans())
def test_any_edit_of_the_manifest_is_accepted_or_refused_in_words(
    artifact: Path, index: int, value: Any, remove: bool
) -> None:
    content = json.loads((artifact / "kvpack.json").read_bytes())
    found = places(content)
    container, key = found[index % len(found)]
    if remove:
        del container[key]
    elif key != "manifest_sha256":
        container[key] = value
    text = json.dumps(content)
    if "manifest_sha256" not in content:
        return
    path = artifact.parent / "forged.json"
    write_forged(path, text.encode())
    whole = (artifact / "kvpack.json").read_bytes()
    path.replace(artifact / "kvpack.json")
    try:
        with suppress(ArtifactError):
            Artifact.open(artifact)
    finally:
        (artifact / "kvpack.json").write_bytes(whole)


def test_equal_keys_in_the_manifest(artifact: Path) -> None:
    path = artifact / "kvpack.json"
    write_forged(path, path.read_bytes().replace(b'"seed": 0', b'"seed": 1,\n"seed": 0'))
    with pytest.raises(ArtifactError, match="'seed' appears twice"):
        Artifact.open(artifact)


def test_an_index_that_points_elsewhere(artifact: Path) -> None:
    path = artifact / "kvpack.safetensors.index.json"
    index = json.loads(path.read_bytes())
    index["weight_map"]["norm.weight"] = "kvpack-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refresh(artifact, path.name)
    with pytest.raises(ArtifactError, match="does not match the weight files"):
        Artifact.open(artifact)


def test_shards_that_exchange_their_tensors(artifact: Path) -> None:
    first, second = sorted(artifact.glob("kvpack-0*"))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[0])
    second.write_bytes(data[0])
    refresh(artifact, second.name)
    with pytest.raises(ArtifactError, match=rf"is in {first.name} too"):
        Artifact.open(artifact)


def test_the_manifest_holds_no_path_of_this_machine(artifact: Path) -> None:
    text = (artifact / "kvpack.json").read_text(encoding="utf-8")
    assert str(artifact.parent) not in text
    assert os.uname().nodename not in text


def test_the_fields_of_version_1_stay_as_they_are() -> None:
    """A field that is renamed, or added without a default, needs a new format version."""
    required = {
        cls.__name__: {
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        for cls in (
            AttentionSpec,
            DroppedTensor,
            KVLayerPlan,
            PlanePlan,
            Projection,
            m.Manifest,
            m.BaseModel,
            m.FileRecord,
            m.PackedLinear,
            m.RecipeRecord,
            m.TensorRecord,
            m.Totals,
        )
    }
    assert {name: " ".join(sorted(fields)) for name, fields in required.items()} == {
        "AttentionSpec": "block head_dim heads key key_norm kind kv_heads layer module output query "
        "value window",
        "DroppedTensor": "name reason",
        "KVLayerPlan": "attention key policy value",
        "PlanePlan": "codecs folded states transforms",
        "Projection": "heads linear",
        "Manifest": "base_model calibration copied dropped files kv kv_state kvpack_version recipe "
        "resolved_recipe seed totals versions weights",
        "BaseModel": "architecture dtype family files parameters tied",
        "FileRecord": "bytes sha256",
        "PackedLinear": "bits_per_element codec dtype role shape solver tensors",
        "RecipeRecord": "name path sha256 source",
        "TensorRecord": "dtype sha256 shape",
        "Totals": "bits_per_weight kv_state_bytes weight_bytes",
    }
