"""Opens an artifact: everything is checked against the real files before anything is allocated.

Opening needs no torch; only reading tensors does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvpack.artifact.damage import check_hashes
from kvpack.artifact.layout import (
    INDEX_FILE,
    KV_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    is_shard,
    shard_name,
)
from kvpack.artifact.manifest import Manifest, TensorRecord
from kvpack.artifact.part_checks import check_parts
from kvpack.artifact.paths import member, visible_files
from kvpack.core import weight_code
from kvpack.core.errors import ArtifactError
from kvpack.core.packed_bytes import PackedBytes, unpack
from kvpack.core.progress import SILENT, Progress
from kvpack.core.safetensors_header import TensorEntry, read_header
from kvpack.core.strict_json import parse_json
from kvpack.core.tensor_io import read_tensor
from kvpack.core.types import Solution

if TYPE_CHECKING:
    from torch import Tensor

Check = Literal["structure", "full"]

MAX_MANIFEST_BYTES = 100_000_000


@dataclass(frozen=True)
class Artifact:
    """A checked artifact. `places` tells file and position of every weight tensor and KV state."""

    path: Path
    manifest: Manifest
    places: Mapping[str, tuple[str, TensorEntry]]
    kv_places: Mapping[str, tuple[str, TensorEntry]]

    @classmethod
    def open(cls, path: str | Path, check: Check = "full", progress: Progress = SILENT) -> Artifact:
        """Open and check an artifact.

        Args:
            path: its folder.
            check: "structure" compares names, sizes, shapes and dtypes; "full" also hashes every
                byte.
            progress: told of every file that is hashed.

        Raises:
            ArtifactError: anything is missing, damaged, unexpected or too new; says which file
                and tensor.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        _check_files(folder, manifest)
        if check == "full":
            check_hashes(folder, manifest, progress)
        weights, kv = _places(folder, manifest)
        _check_tensors(manifest.weight_tensors(), weights, folder)
        _check_tensors(manifest.kv_state, kv, folder)
        _check_index(folder, weights)
        check_parts(manifest, folder / MANIFEST_FILE)
        return cls(folder, manifest, weights, kv)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of all weight tensors, in the order in which they are stored."""
        return tuple(self.places)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the manifest included."""
        return self.manifest.nbytes + (self.path / MANIFEST_FILE).stat().st_size

    def read(self, name: str) -> Tensor:
        """Read one weight tensor, unpacked where it is stored packed.

        Raises:
            ArtifactError: there is none of that name, or its file changed since it was checked.
        """
        stored = self.read_stored(name)
        packed = self._packed.get(name)
        if packed is None:
            return stored
        return unpack(stored, packed, name, where=str(self.path / self.places[name][0]), hashed=True)

    def read_stored(self, name: str) -> Tensor:
        """Read one weight tensor as it is on the disk: a blob where it is packed; errors as of `read`."""
        if name not in self.places:
            raise ArtifactError(f"has no tensor {name!r}", where=str(self.path))
        file, entry = self.places[name]
        return read_tensor(self.path / file, entry)

    @cached_property
    def _packed(self) -> dict[str, PackedBytes]:
        records = self.manifest.weight_tensors().items()
        return {name: record.packed for name, record in records if record.packed is not None}

    def solution(self, linear: str) -> Solution:
        """Read a packed layer.

        Raises:
            ArtifactError: there is no such layer.
        """
        packed = self.manifest.weights.get(linear)
        if packed is None:
            raise ArtifactError(f"has no packed layer {linear!r}", where=str(self.path))
        tensors = {part: self.read(f"{linear}.{part}") for part in packed.tensors}
        return weight_code.solution(packed.codec, tensors, packed.shape)

    def kv_state(self) -> dict[str, Tensor]:
        """Read the state of all KV transforms, by `kvpack.recipe.kv_plan.state_name`."""
        return {n: read_tensor(self.path / file, entry) for n, (file, entry) in self.kv_places.items()}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest alone; see `Manifest.from_json` for the errors.

    Raises:
        ArtifactError: the folder holds no manifest.
    """
    if not (folder / MANIFEST_FILE).exists():
        raise ArtifactError(
            f"holds no {MANIFEST_FILE}",
            where=str(folder),
            why="without it nothing is an artifact",
            hint="give the folder that `kvpack export` made",
        )
    path = member(folder, MANIFEST_FILE)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"is larger than {MAX_MANIFEST_BYTES:,} bytes", where=str(path))
    return _parsed(_bytes(path), str(path))


@functools.lru_cache(maxsize=2)
def _parsed(data: bytes, where: str) -> Manifest:
    """Loading looks at the same manifest more than once; a large one takes half a second to parse."""
    return Manifest.from_json(data, where)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise ArtifactError(f"cannot be read: {problem.strerror}", where=str(path)) from problem


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Exactly the listed files, each of its size. Hidden files and a signature may stand beside."""
    for name, record in manifest.files.items():
        size = member(folder, name).stat().st_size
        if size != record.bytes:
            raise ArtifactError(
                f"{name} is {size:,} bytes, the manifest says {record.bytes:,}",
                where=str(folder),
                hint="copy or download this file again",
            )
    extra = set(visible_files(folder)) - manifest.files.keys() - {MANIFEST_FILE, SIGNATURE_FILE}
    if extra:
        raise ArtifactError(
            f"{sorted(extra)[0]} is not in the manifest",
            where=str(folder),
            why="something was added to the artifact",
            hint="remove it",
        )


def _places(
    folder: Path, manifest: Manifest
) -> tuple[dict[str, tuple[str, TensorEntry]], dict[str, tuple[str, TensorEntry]]]:
    """Where every weight tensor and every KV state is, from the headers."""
    shards = sorted(filter(is_shard, manifest.files))
    if shards != [shard_name(i + 1, len(shards)) for i in range(len(shards))] or not shards:
        raise ArtifactError("its weight files are not numbered without gaps", where=str(folder))
    weights: dict[str, tuple[str, TensorEntry]] = {}
    for file in shards:
        for name, entry in read_header(folder / file).tensors.items():
            if name in weights:
                raise ArtifactError(f"{name!r} is in {weights[name][0]} too", where=str(folder / file))
            weights[name] = (file, entry)
    kv = read_header(folder / KV_FILE).tensors if KV_FILE in manifest.files else {}
    return weights, {name: (KV_FILE, entry) for name, entry in kv.items()}


def _check_tensors(
    stated: Mapping[str, TensorRecord], found: Mapping[str, tuple[str, TensorEntry]], folder: Path
) -> None:
    for name in sorted(stated.keys() - found.keys()):
        raise ArtifactError(f"tensor {name!r} is in the manifest and in no file", where=str(folder))
    for name, (file, entry) in found.items():
        if name not in stated:
            raise ArtifactError(f"tensor {name!r} is not in the manifest", where=str(folder / file))
        if not stated[name].matches(entry):
            raise ArtifactError(
                f"tensor {name!r} is {entry.dtype} {entry.shape}, the manifest says "
                f"{stated[name].dtype} {stated[name].shape}",
                where=str(folder / file),
            )


def _check_index(folder: Path, weights: Mapping[str, tuple[str, TensorEntry]]) -> None:
    path = member(folder, INDEX_FILE)
    index: Any = parse_json(_bytes(path), where=str(path), error=ArtifactError)
    expected = {
        "metadata": {"total_size": sum(entry.nbytes for _, entry in weights.values())},
        "weight_map": {name: file for name, (file, _) in weights.items()},
    }
    if index != expected:
        raise ArtifactError("does not match the weight files", where=str(path))
