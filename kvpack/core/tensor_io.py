"""Tensors to bytes and back, one at a time.

Files are read, not mapped: pages of a mapped file count as resident memory of the process, and a
file that shrinks under a mapping kills it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvpack.core.errors import ArtifactError, KvpackError
from kvpack.core.lazy import torch
from kvpack.core.safetensors_header import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


def read_tensor(path: Path, entry: TensorEntry, *, error: type[KvpackError] = ArtifactError) -> Tensor:
    """Read one tensor into fresh memory.

    Args:
        path: a safetensors file whose header was checked.
        entry: the tensor's place in it.
        error: class of the error to raise.

    Raises:
        KvpackError: of class `error`; the file cannot be read, or ends inside the tensor.
    """
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    view, done = raw.numpy().data, 0
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            while done < entry.nbytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise error(
                        f"{path.name} ends at byte {entry.start + done:,}, a tensor needs {entry.stop:,}",
                        where=str(path.parent),
                        hint="the file is truncated: copy or download it again",
                    )
                done += count
    except OSError as problem:
        raise error(f"cannot be read: {problem.strerror or problem}", where=str(path)) from problem
    return raw.view(getattr(torch, entry.dtype)).reshape(entry.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; copies only what is not contiguous or not on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
