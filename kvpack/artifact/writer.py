"""Writes an artifact while its tensors are made; peak memory is one tensor."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvpack.artifact.canonical import plain_json
from kvpack.artifact.files import BUFFER_BYTES, HashedFile
from kvpack.artifact.layout import INDEX_FILE as INDEX_FILE
from kvpack.artifact.layout import KV_FILE, MANIFEST_FILE, shard_name
from kvpack.artifact.manifest import FileRecord, Manifest, TensorRecord
from kvpack.artifact.paths import check_name
from kvpack.artifact.spool import PackedShards, Shard
from kvpack.artifact.tensor_file import TensorFile, split_shards
from kvpack.core.atomic import NewFolder, require_space, writing
from kvpack.core.errors import KvpackError, SourceError
from kvpack.core.types import TensorSpec
from kvpack.recipe.recipe import StorageRecipe

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 4_000_000_000
"""Largest weight file, unless one tensor is larger."""


@dataclass(frozen=True)
class Written:
    """What is on the disk so far: the manifest is made from it."""

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    kv_state: Mapping[str, TensorRecord]


class ArtifactWriter:
    """Context manager around one artifact.

    Within it: `begin_weights`, `write_tensor` for every tensor in order, any number of other
    files, and `finish`. Leaving it in any other way removes every trace.

    Args:
        out: folder to make. It must not exist, or be an artifact and `force` be set.
        force: replace an existing artifact, after the new one is complete.
        planned_bytes: what will be written, as far as it is known.
    """

    def __init__(self, out: Path, *, force: bool = False, planned_bytes: int = 0) -> None:
        self._folder = NewFolder(out, force=force)
        self._planned_bytes = planned_bytes
        self._files: dict[str, FileRecord] = {}
        self._tensors: dict[str, TensorRecord] = {}
        self._kv_state: dict[str, TensorRecord] = {}
        self._shards: list[dict[str, TensorSpec]] = []
        self._shard: TensorFile | None = None
        self._packed: PackedShards | None = None
        self._done = 0
        self._stack = ExitStack()

    def __enter__(self) -> ArtifactWriter:
        """Make the scratch folder.

        Raises:
            UsageError: `out` exists and may not be replaced, or another process is writing it.
            ResourceError: the disk has no room for `planned_bytes`.
        """
        require_space(self._folder.target, self._planned_bytes)
        self._folder.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._folder.abandon()

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder for intermediate files; it goes with the scratch folder whatever happens."""
        folder = self._folder.scratch / ".work"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def written(self) -> Written:
        """Records of everything that is complete."""
        return Written(dict(self._files), dict(self._tensors), dict(self._kv_state))

    def begin_weights(
        self,
        specs: Mapping[str, TensorSpec],
        shard_bytes: int = SHARD_BYTES,
        storage: StorageRecipe | None = None,
        packable: Collection[str] = (),
    ) -> None:
        """Announce all weight tensors, in the order in which they will come.

        With `storage`, those that are `packable` are packed by it; one file's tensors are then on the
        disk twice for a moment.

        Raises:
            ResourceError: the disk has no room for them.
        """
        nbytes = sum(spec.nbytes for spec in specs.values())
        require_space(self._folder.scratch, nbytes + (min(nbytes, shard_bytes) if storage else 0))
        if storage is not None and specs:
            self._packed = PackedShards(self._folder.scratch, specs, packable, storage, shard_bytes)
            self._stack.callback(self._packed.close)
            return
        self._shards = split_shards(specs, shard_bytes)
        self._next_shard()

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        """Write the next weight tensor.

        Raises:
            KvpackError: it is not the one that was announced.
            ResourceError: the disk is full.
        """
        if self._packed is not None:
            self._packed.write(name, tensor)
            if self._packed.complete:
                self._take(self._packed.shards)
                self._packed = None
            return
        if self._shard is None:
            raise KvpackError(f"{name} comes after the last planned tensor")
        self._shard.write(name, tensor)
        self._next_shard()

    def write_kv_state(self, specs: Mapping[str, TensorSpec], state: Mapping[str, Tensor]) -> None:
        """Write the state of the KV transforms; no file where there is none.

        Raises:
            KvpackError: `state` is not what `specs` announces.
        """
        if specs.keys() != state.keys():
            odd = sorted(specs.keys() ^ state.keys())[0]
            raise KvpackError(f"KV state {odd} is either not planned or not there")
        if not specs:
            return
        with TensorFile(self._path(KV_FILE), specs) as file:
            for name in specs:
                file.write(name, state[name])
            self._kv_state = file.records
            self._files[KV_FILE] = file.close()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file with sorted keys."""
        self._write(name, plain_json(content))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, UTF-8."""
        self._write(name, text.encode("utf-8"))

    def copy_file(self, source: Path, name: str = "") -> None:
        """Copy a file's content, under its own name unless `name` is given.

        Raises:
            SourceError: it cannot be read.
        """
        name = name or source.name
        with HashedFile(self._path(name)) as file:
            try:
                stream = source.open("rb")
            except OSError as problem:
                raise SourceError(f"cannot be read: {problem.strerror}", where=str(source)) from problem
            with stream:
                while chunk := stream.read(BUFFER_BYTES):
                    file.write(chunk)
            self._files[name] = file.close()

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest and make the artifact appear under its name.

        Args:
            manifest: describes what was written; its `files` are filled in here.

        Returns:
            The manifest as it was written.
        """
        if self._shard is not None or not self._shards:
            raise KvpackError("the weights are not complete", where=str(self._folder.target))
        manifest = dataclasses.replace(manifest, files=dict(self._files))
        if manifest.weight_tensors() != self._tensors or dict(manifest.kv_state) != self._kv_state:
            raise KvpackError("the manifest lists other tensors than were written")
        self._write(MANIFEST_FILE, manifest.to_json())
        self._folder.commit()
        return manifest

    def _next_shard(self) -> None:
        """Close the open shard when it is complete, and open the next one while there is one."""
        while self._shard is None or self._shard.complete:
            if self._shard is not None:
                self._files[shard_name(self._done, len(self._shards))] = self._shard.close()
                self._tensors.update(self._shard.records)
                self._shard = None
            if self._done == len(self._shards):
                self._write_index()
                return
            self._done += 1
            path = self._path(shard_name(self._done, len(self._shards)))
            self._shard = self._stack.enter_context(TensorFile(path, self._shards[self._done - 1]))

    def _take(self, shards: Sequence[Shard]) -> None:
        """Give files of packed tensors their names, now that their number is known."""
        for number, (path, file, records) in enumerate(shards, start=1):
            name = shard_name(number, len(shards))
            with writing(path):
                path.rename(self._path(name))
            self._files[name] = file
            self._tensors.update(records)
            self._shards.append(dict(records))
        self._write_index()

    def _write_index(self) -> None:
        files = enumerate(self._shards, start=1)
        place = {name: shard_name(i, len(self._shards)) for i, shard in files for name in shard}
        total = sum(record.nbytes for record in self._tensors.values())
        self.write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": place})

    def _write(self, name: str, data: bytes) -> None:
        with HashedFile(self._path(name)) as file:
            file.write(data)
            self._files[name] = file.close()

    def _path(self, name: str) -> Path:
        """Place of a new file; its folder is made."""
        path = self._folder.scratch / check_name(name, where="", error=KvpackError)
        if path.exists():
            raise KvpackError(f"{name} is written twice", where=str(self._folder.target))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path
