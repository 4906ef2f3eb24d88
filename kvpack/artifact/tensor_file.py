"""Safetensors files written front to back: the header first, then tensors as they come.

Shapes are known before any number exists, so nothing has to be held back: the memory needed is
that of the tensor at hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from kvpack.artifact.files import HashedFile
from kvpack.artifact.manifest import FileRecord, TensorRecord
from kvpack.core.errors import KvpackError
from kvpack.core.safetensors_header import DTYPES, MAX_HEADER_BYTES
from kvpack.core.tensor_io import tensor_bytes
from kvpack.core.types import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_STORED = {name: stored for stored, name in DTYPES.items()}


def header_bytes(specs: Mapping[str, TensorSpec]) -> bytes:
    """Length and header of a file that holds tensors in the order of `specs`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in specs.items():
        offsets = [position, position + spec.nbytes]
        header[name] = {"dtype": _STORED[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise KvpackError(f"{len(specs):,} tensors do not fit into one file", hint="use smaller shards")
    return len(text).to_bytes(8, "little") + text


def split_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """Cut a sequence of tensors into files of at most `shard_bytes`, larger ones alone in theirs."""
    shards: list[dict[str, TensorSpec]] = [{}]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + spec.nbytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = spec
        held += spec.nbytes
    return shards


def check_announced(
    due: Sequence[tuple[str, TensorSpec]], name: str, tensor: Tensor, where: str
) -> TensorSpec:
    """The announcement of the next tensor, which is the last one of `due`.

    Raises:
        KvpackError: this is not it; a defect of the caller.
    """
    expected, spec = due[-1] if due else ("nothing", TensorSpec((), "uint8"))
    found = TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if (name, found.shape, found.dtype) != (expected, spec.shape, spec.dtype):
        raise KvpackError(
            f"got {name} {found.shape} {found.dtype}, planned was {expected} {spec.shape} {spec.dtype}",
            where=where,
            hint="this is a defect in kvpack; please report it",
        )
    return spec


class TensorFile:
    """A safetensors file under construction; `records` grows with every tensor written."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.records: dict[str, TensorRecord] = {}
        self._due = list(specs.items())[::-1]
        self._file = HashedFile(path)
        self._file.write(header_bytes(specs))

    @property
    def complete(self) -> bool:
        """Whether every tensor is written."""
        return not self._due

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Raises:
            KvpackError: it is not the tensor that was announced; a defect of the caller.
        """
        spec = check_announced(self._due, name, tensor, self._file.path.name)
        data = tensor_bytes(tensor)
        self._file.write(data)
        self.records[name] = TensorRecord(spec.shape, spec.dtype, hashlib.sha256(data).hexdigest())
        self._due.pop()

    def close(self) -> FileRecord:
        """Put a complete file on the disk."""
        return self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)
