"""Files that the system holds in memory: reading them beforehand, or having them dropped."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_PIECE = 8 << 20
_REST = 0.01


def read_through(folder: Path) -> None:
    """Read the weights once, for the system to keep them in memory."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.read(_PIECE):
                pass


def drop(folder: Path) -> bool:
    """Have the system drop every file of a folder from memory, so that the next reader waits for the disk.

    Returns:
        Whether it did, as far as it tells, but for a hundredth. Files that another process maps stay; some
        systems and file systems drop nothing, or do not tell.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    held = sum(_drop_file(path) for path in files)
    return held <= _REST * sum(path.stat().st_size for path in files)


def _drop_file(path: Path) -> int:
    """Drop a file; bytes of it that stayed, all where the system cannot drop or does not tell."""
    with path.open("rb", buffering=0) as stream:
        file = stream.fileno()
        try:
            os.fsync(file)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            return _held(file)
        except (AttributeError, OSError):
            return os.fstat(file).st_size


def _held(file: int) -> int:
    """Bytes of a file that are in memory, without touching any.

    Raises:
        AttributeError: this system has no such call.
        OSError: it failed.
    """
    size = os.fstat(file).st_size
    if not size:
        return 0
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with mmap.mmap(file, size, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)  # which takes writable memory only; nothing is written
        where, length = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size)
        del first
        failed = ctypes.CDLL(None, use_errno=True).mincore(where, length, pages)
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return mmap.PAGESIZE * (len(pages) - bytes(pages).count(0))
