"""Files that the system holds in memory: reading them beforehand, or having them dropped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PIECE = 8 << 20
_SAMPLES = 16


def read_through(folder: Path) -> None:
    """Read the weights once, for the system to keep them in memory."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.read(_PIECE):
                pass


def drop(folder: Path) -> bool:
    """Have the system drop every file of a folder from memory, so that the next reader waits for the disk.

    Returns:
        Whether it did, as far as samples tell. Files that another process maps stay; some systems and
        file systems drop nothing, or do not tell.
    """
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return False
    kept = [path for path in sorted(folder.iterdir()) if path.is_file() and not _drop_file(path, advise)]
    return not kept


def _drop_file(path: Path, advise: Any) -> bool:
    with path.open("rb", buffering=0) as stream:
        file = stream.fileno()
        try:
            os.fsync(file)  # what is not on the disk yet cannot be dropped
            advise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            held = any(_held(file))
            advise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # asking may have read a little
        except OSError:
            return False
    return not held


def _held(file: int) -> Iterator[bool]:
    """Whether bytes of a file, here and there, are in memory; where the system does not tell, they are."""
    at_once: Any = getattr(os, "RWF_NOWAIT", None)
    size, buffer = os.fstat(file).st_size, bytearray(1)
    for sample in range(_SAMPLES if size else 0):
        if at_once is None:
            yield True
        else:
            try:
                yield os.preadv(file, [buffer], sample * size // _SAMPLES, at_once) > 0
            except BlockingIOError:
                yield False
