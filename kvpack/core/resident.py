"""Memory of this process and of the machine, as Linux tells it; None on other systems."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

from kvpack.core import containers

_KIB = 1024


def _field(file: str, name: str) -> int | None:
    """A size in KiB of a file in /proc, in bytes."""
    try:
        lines = Path(file).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * _KIB for line in lines if line.startswith(f"{name}:")), None)


def resident_bytes() -> int | None:
    """Resident memory of this process, mapped files included."""
    return _field("/proc/self/status", "VmRSS")


def own_bytes() -> int | None:
    """Resident memory of this process without mapped files, after all that is free was given back."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
    return _field("/proc/self/status", "RssAnon")


def available_bytes() -> int | None:
    """Memory that new work can have without swapping: of the machine, and of the container this runs in."""
    free, room = _field("/proc/meminfo", "MemAvailable"), containers.room()
    return free if free is None or room is None else min(free, room)


def reset_peak() -> bool:
    """Let `kvpack.core.memory.peak_memory_bytes` count from now on; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
