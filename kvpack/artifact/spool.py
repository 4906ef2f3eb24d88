"""Weight files of packed tensors: sizes are known only afterwards, so that data waits for its header."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvpack.artifact.files import BUFFER_BYTES, HashedFile
from kvpack.artifact.manifest import FileRecord, TensorRecord
from kvpack.artifact.tensor_file import check_announced, header_bytes
from kvpack.core.atomic import writing
from kvpack.core.packed_bytes import PackedBytes, pack, worthwhile
from kvpack.core.tensor_io import tensor_bytes
from kvpack.core.types import TensorSpec
from kvpack.recipe.recipe import StorageRecipe

if TYPE_CHECKING:
    from torch import Tensor

Shard = tuple[Path, FileRecord, dict[str, TensorRecord]]


class PackedShards:
    """Weight files under construction, and the spool in which the newest tensors wait.

    Args:
        folder: where files are made, under hidden names; whoever asks for them names them.
        specs: all tensors, in the order in which they will come, before packing.
        packable: names of those that may be packed.
        storage: how.
        shard_bytes: of tensors per file, unless one is larger.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        packable: Collection[str],
        storage: StorageRecipe,
        shard_bytes: int,
    ) -> None:
        self.shards: list[Shard] = []
        self._due = list(specs.items())[::-1]
        self._packable, self._storage = frozenset(packable), storage
        self._folder, self._shard_bytes = folder, shard_bytes
        self._records: dict[str, TensorRecord] = {}
        self._spool = folder / ".spool"
        self._held = 0
        with writing(self._spool):
            self._stream = self._spool.open("x+b")

    @property
    def complete(self) -> bool:
        """Whether every tensor has come."""
        return not self._due

    def write(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor; after the last one all files are complete.

        Raises:
            KvpackError: it is not the tensor that was announced; a defect of the caller.
        """
        check_announced(self._due, name, tensor, self._spool.name)
        with writing(self._spool):
            record = self._add(tensor, name in self._packable)
            if self._records and self._held + record.nbytes > self._shard_bytes:
                self._flush(self._held, record.nbytes)
            self._records[name] = record
            self._held += record.nbytes
            self._due.pop()
            if self.complete:
                self._flush(self._held, 0)
                self.close()

    def close(self) -> None:
        """Let go of the spool; a second call does nothing."""
        self._stream.close()
        self._spool.unlink(missing_ok=True)

    def _add(self, tensor: Tensor, packable: bool) -> TensorRecord:
        """Put a tensor behind the others; packed if the whole of it then takes less."""
        raw = tensor_bytes(tensor)
        spec = TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        record = self._add_packed(raw, spec) if packable else None
        if record is None:
            self._stream.seek(self._held)
            self._stream.write(raw)
            record = TensorRecord(spec.shape, spec.dtype, hashlib.sha256(raw).hexdigest())
        return record

    def _add_packed(self, raw: memoryview, spec: TensorSpec) -> TensorRecord | None:
        how = self._storage
        packer = worthwhile(how.packer, raw, spec.dtype, how.gain)
        if packer is None:
            return None
        sizes, digest = [], hashlib.sha256()
        self._stream.seek(self._held)
        for block in pack(packer, raw, spec.dtype, how.block_bytes):
            self._stream.write(block)
            digest.update(block)
            sizes.append(len(block))
        if sum(sizes) >= (1 - how.gain) * len(raw):
            return None
        exact = hashlib.sha256(raw).hexdigest()
        packed = PackedBytes(spec.shape, spec.dtype, packer, how.block_bytes, tuple(sizes), exact)
        return TensorRecord((sum(sizes),), "uint8", digest.hexdigest(), packed)

    def _flush(self, nbytes: int, rest: int) -> None:
        """Make a file of the first `nbytes` of the spool, and keep the `rest` behind them."""
        path = self._folder / f".shard-{len(self.shards) + 1:05}"
        with HashedFile(path) as file:
            file.write(header_bytes(self._records))
            self._copy(0, nbytes, file)
            self.shards.append((path, file.close(), self._records))
        self._move_back(nbytes, rest)
        self._records, self._held = {}, 0

    def _copy(self, start: int, stop: int, file: HashedFile) -> None:
        self._stream.seek(start)
        while start < stop:
            chunk = self._stream.read(min(BUFFER_BYTES, stop - start))
            file.write(chunk)
            start += len(chunk)

    def _move_back(self, start: int, nbytes: int) -> None:
        """Put `nbytes` from `start` at the beginning of the spool, which ends behind them."""
        for done in range(0, nbytes, BUFFER_BYTES):
            self._stream.seek(start + done)
            chunk = self._stream.read(min(BUFFER_BYTES, nbytes - done))
            self._stream.seek(done)
            self._stream.write(chunk)
        self._stream.truncate(nbytes)
