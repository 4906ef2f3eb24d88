"""Resident memory: what it was at most, and keeping it at what is in use."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BYTES = 5 << 20
"""Above the working pieces of `kvpack.core.pieces`, whose memory is used again and again."""
KEPT_BYTES = 64 << 20


def return_large_blocks() -> None:
    """Make the C library give freed blocks of `LARGE_BYTES` and more back to the system at once.

    glibc raises its own threshold up to 32 MiB as such blocks are freed. Weights of that size then
    come from a heap that only shrinks at its end: reading a model block by block, resident memory
    was measured to grow by 70 MiB per decoder block although every tensor had been freed. A fixed
    threshold keeps it flat. Up to `KEPT_BYTES` of smaller ones stay with the process: fetching them from
    the system for every piece of a weight took about as long as rounding it. Other C libraries, and a
    threshold that the user set, are left alone.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    except (AttributeError, OSError):
        return


def peak_memory_bytes() -> int:
    """Peak resident memory of this process; 0 where the platform does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak includes that of the process which started this one.
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
