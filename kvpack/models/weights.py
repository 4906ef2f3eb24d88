"""Reading the weights of a checkpoint one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from kvpack.core.errors import SourceError
from kvpack.core.model_spec import ModelSpec, SourceTensor
from kvpack.core.safetensors_header import Header, TensorEntry, read_header
from kvpack.core.tensor_io import read_tensor
from kvpack.core.types import ITEM_BYTES

if TYPE_CHECKING:
    from torch import Tensor


class SourceReader:
    """Reads tensors of a checkpoint by name; nothing stays open or in memory between reads.

    Tied names are followed to the tensor that holds the data.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, SourceTensor], tied: Mapping[str, str] | None = None
    ) -> None:
        self._path, self._tensors, self._tied = path, tensors, tied or {}
        self._header = lru_cache(maxsize=None)(self._read_header)

    @classmethod
    def of(cls, spec: ModelSpec) -> SourceReader:
        """A reader of the checkpoint that `spec` describes."""
        return cls(spec.path, spec.tensors, spec.tied)

    def read(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype.

        Raises:
            SourceError: there is no such tensor, or its file changed since it was described.
        """
        tensor = self._tensors.get(self._tied.get(name, name))
        if tensor is None:
            raise SourceError(f"no tensor {name!r}", where=str(self._path))
        stored = tensor.stored_name or self._tied.get(name, name)
        file = self._path / tensor.file
        entry = self._header(tensor.file).tensors.get(stored)
        described = (tensor.stored_shape or tensor.shape, tensor.dtype)
        if entry is None or (tuple(entry.shape), entry.dtype) != described:
            raise SourceError(f"tensor {stored!r} changed since the model was opened", where=str(file))
        start = entry.start + tensor.first * ITEM_BYTES[tensor.dtype]
        piece = TensorEntry(tensor.shape, tensor.dtype, start, start + tensor.nbytes)
        return read_tensor(file, piece, error=SourceError)

    def _read_header(self, file: str) -> Header:
        return read_header(self._path / file, error=SourceError)
