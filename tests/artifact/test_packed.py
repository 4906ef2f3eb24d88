"""Tensors that are stored losslessly coded: the same bytes back, damage by name, lies refused early."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpack.artifact.manifest import Manifest
from kvpack.artifact.reader import Artifact
from kvpack.artifact.writer import ArtifactWriter
from kvpack.core.errors import ArtifactError, KvpackError
from kvpack.core.packed_bytes import PackedBytes, sample, unpack
from kvpack.parts.packers.byte_planes import BytePlanes
from kvpack.parts.packers.zstd import Zstd
from kvpack.recipe.recipe import StorageRecipe
from tests.artifact import conftest
from tests.artifact.conftest import snapshot, specs_of, tensors, write_rest
from tests.artifact.test_damage import forge, refresh

STORAGE = StorageRecipe(BytePlanes((Zstd(),)), block_bytes=4096, gain=0.0)
WIDE = "blocks.0.wide"
TARGET = f"{WIDE}.codes"


@pytest.fixture(autouse=True)
def one_layer_is_wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conftest.LINEARS, WIDE, (40, 240))


def compressible() -> dict[str, Tensor]:
    """The usual tiny tensors, those of packed layers less random; a codec's own shapes."""
    return {n: t if n == "norm.weight" else torch.zeros_like(t) for n, t in tensors().items()}


def write(out: Path, *, shard_bytes: int = 1 << 20, made: dict[str, Tensor] | None = None) -> Manifest:
    made = compressible() if made is None else made
    with ArtifactWriter(out) as writer:
        packable = [name for name in made if name != "norm.weight"]
        writer.begin_weights(specs_of(made), shard_bytes, STORAGE, packable)
        for name, tensor in made.items():
            writer.write_tensor(name, tensor)
        return write_rest(writer)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    write(out)
    return out


def records(manifest: Manifest) -> dict[str, PackedBytes]:
    return {n: r.packed for n, r in manifest.weight_tensors().items() if r.packed is not None}


def test_tensors_come_back_and_only_what_saves_is_coded(packed: Path) -> None:
    artifact = Artifact.open(packed)
    found = records(artifact.manifest)
    assert TARGET in found
    assert "norm.weight" not in found
    for name, tensor in compressible().items():
        assert torch.equal(artifact.read(name), tensor)
        stored = artifact.read_stored(name)
        assert (stored.nbytes < tensor.nbytes) == (name in found)
    assert artifact.manifest.totals.weight_bytes == sum(
        artifact.read_stored(n).nbytes for n in artifact.tensor_names
    )


def test_incompressible_tensors_are_stored_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "out", made=tensors())
    artifact = Artifact.open(tmp_path / "out")
    for name, tensor in tensors().items():
        assert torch.equal(artifact.read(name), tensor)
        assert artifact.read_stored(name).nbytes <= tensor.nbytes


@pytest.mark.parametrize("shard_bytes", [1, 60, 300, 1 << 20])
def test_two_exports_are_equal_in_any_number_of_files(tmp_path: Path, shard_bytes: int) -> None:
    for name in "ab":
        write(tmp_path / name, shard_bytes=shard_bytes)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    artifact = Artifact.open(tmp_path / "a")
    assert all(torch.equal(artifact.read(n), t) for n, t in compressible().items())
    shards = [n for n in artifact.manifest.files if n.startswith("kvpack-0")]
    assert (len(shards) == len(compressible())) == (shard_bytes == 1)


def test_a_writer_that_stops_early_leaves_nothing(tmp_path: Path) -> None:
    made = compressible()
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.begin_weights(specs_of(made), 1 << 20, STORAGE, list(made))
        name = next(iter(made))
        with pytest.raises(KvpackError, match="planned was"):
            writer.write_tensor("odd", made[name])
        writer.write_tensor(name, made[name])
    assert list(tmp_path.iterdir()) == []


def spoil(folder: Path, name: str, at: int = -1) -> None:
    """Change one byte of a stored tensor; the file's hash in the manifest follows, as after an attack."""
    file, entry = Artifact.open(folder, "structure").places[name]
    data = bytearray((folder / file).read_bytes())
    data[entry.stop + at if at < 0 else entry.start + at] ^= 1
    (folder / file).write_bytes(data)


def test_a_damaged_block_is_named_with_its_tensor(packed: Path) -> None:
    spoil(packed, TARGET)
    with pytest.raises(ArtifactError, match=re.escape(f"{TARGET} (block 0 of 1)")):
        Artifact.open(packed)
    with pytest.raises(ArtifactError, match=re.escape(f"{TARGET}, block 0 of 1 is damaged")):
        Artifact.open(packed, "structure").read(TARGET)


def test_the_number_of_the_block_is_that_of_the_damage() -> None:
    x = (0.02 * torch.randn(8192, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    raw = x.view(torch.uint8).numpy().data
    blocks = [STORAGE.packer.pack(raw[i : i + 4096], "bfloat16") for i in range(0, 16384, 4096)]
    spec = PackedBytes((8192,), "bfloat16", STORAGE.packer, 4096, tuple(map(len, blocks)), "")
    for number in range(4):
        data = bytearray(b"".join(blocks))
        data[sum(map(len, blocks[: number + 1])) - 1] ^= 16
        with pytest.raises(ArtifactError, match=f"w, block {number} of 4"):
            unpack(torch.tensor(list(data), dtype=torch.uint8), spec, "w")


def test_sound_blocks_of_other_numbers_are_found_by_their_hash(packed: Path) -> None:
    other = Zstd((1,)).pack(b"\1" * 5, "uint8")
    spec = PackedBytes((5,), "uint8", Zstd((1,)), 8, (len(other),), "0" * 64)
    blob = torch.tensor(list(other), dtype=torch.uint8)
    assert unpack(blob, spec, "w").tolist() == [1] * 5
    with pytest.raises(ArtifactError, match="other bytes"):
        unpack(blob, spec, "w", hashed=True)


Lie = Callable[[dict[str, Any]], None]
LIES: list[tuple[Lie, str]] = [
    (lambda p: p.update(sizes=[p["sizes"][0] + 1]), "not as long as"),
    (lambda p: p.update(sizes=[p["sizes"][0], 1]), "blocks cannot be"),
    (lambda p: p.update(sizes=[1 << 40]), "impossible sizes"),
    (lambda p: p.update(sizes=[0]), "impossible sizes"),
    (lambda p: p.update(shape=[1 << 40]), "blocks cannot be"),
    (lambda p: p.update(shape=[-1]), "impossible shape"),
    (lambda p: p.update(dtype="complex64"), "unknown dtype"),
    (lambda p: p.update(dtype="int8"), "not those of its codec"),
    (lambda p: p.update(block_bytes=1 << 30), "out of range"),
    (lambda p: p.update(block_bytes=4097), "multiple of 8"),
    (lambda p: p.update(packer={"kind": "lzma"}), "no packer is called"),
    (lambda p: p["packer"].update(levels=[99999]), "out of range|levels"),
]


@pytest.mark.parametrize(("lie", "why"), LIES)
def test_manifests_that_lie_about_blocks_are_refused(packed: Path, lie: Lie, why: str) -> None:
    layer, part = TARGET.rsplit(".", 1)
    forge(packed, lambda content: lie(content["weights"][layer]["tensors"][part]["packed"]))
    with pytest.raises(ArtifactError, match=why):
        Artifact.open(packed)


def test_a_terabyte_that_is_not_there_is_refused_before_memory_is_asked_for() -> None:
    """A million blocks that are said to be a megabyte each, and are a few bytes of another size."""
    block = Zstd((1,)).pack(bytes(100), "uint8")
    count = 1 << 16
    spec = PackedBytes((count << 24,), "uint8", Zstd((1,)), 1 << 24, (len(block),) * count, "")
    assert spec.nbytes == 1 << 40
    blob = torch.tensor(list(block), dtype=torch.uint8).repeat(count)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="block 0 of 65536 would become 100 bytes"):
        unpack(blob, spec, "w")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_copied_tensors_cannot_be_packed(packed: Path) -> None:
    def lie(content: dict[str, Any]) -> None:
        layer, part = TARGET.rsplit(".", 1)
        record = content["weights"][layer]["tensors"][part]
        content["copied"]["norm.weight"]["packed"] = record["packed"] | {
            "shape": [1],
            "dtype": "uint8",
            "sizes": [8],
            "block_bytes": 8,
        }
        content["copied"]["norm.weight"].update(shape=[8], dtype="uint8")

    forge(packed, lie)
    with pytest.raises(ArtifactError):
        Artifact.open(packed)


def test_a_block_cut_from_the_file_is_noticed(packed: Path) -> None:
    spoil(packed, TARGET, 0)
    name = Artifact.open(packed, "structure").places[TARGET][0]
    refresh(packed, name)
    with pytest.raises(ArtifactError, match=re.escape(TARGET)):
        Artifact.open(packed).read(TARGET)


def test_the_sample_for_the_trial_is_from_all_over_the_tensor() -> None:
    raw = memoryview(bytes(range(250)) * 8000)
    taken = sample(raw)
    assert len(taken) == 1 << 18
    assert taken[:100] == bytes(raw[:100])
    assert taken[-100:] != taken[:100]
    assert sample(raw[:1000]) == bytes(raw[:1000])


def test_manifest_tells_what_is_packed_and_parses_to_itself(packed: Path) -> None:
    manifest = Artifact.open(packed).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    layer, part = TARGET.rsplit(".", 1)
    record = json.loads(manifest.to_json())["weights"][layer]["tensors"][part]["packed"]
    assert record.keys() == {"shape", "dtype", "packer", "block_bytes", "sizes", "sha256"}
    linear = manifest.weights[layer]
    assert linear.nbytes < linear.unpacked_nbytes
