"""What the numbers were measured on, and whether others used it at the same time."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kvpack import __version__

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
_ARM_FLAGS = ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")
_PACKAGES = ("torch", "transformers", "numba", "triton")


@dataclass(frozen=True)
class Machine:
    """Processor, system, versions, and how busy others kept it.

    `load_start` and `load_end` are the system's load averages over one minute, the latter with what the
    benchmark itself did. `others` is the share of all processor time during the run that went to
    other programs. None where the system does not tell.
    """

    processor: str
    flags: tuple[str, ...]
    cores: int
    system: str
    versions: Mapping[str, str | None]
    load_start: float | None = None
    load_end: float | None = None
    others: float | None = None


class Watch:
    """Watches the machine from its making until `machine` is called."""

    def __init__(self) -> None:
        self._load, self._started = _load(), time.monotonic()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def machine(self) -> Machine:
        """The machine, and what was seen of it since; workers count once they have ended."""
        return Machine(
            _processor(),
            _flags(),
            os.cpu_count() or 1,
            platform.platform(),
            versions(),
            self._load,
            _load(),
            self._others(),
        )

    def _others(self) -> float | None:
        busy, elapsed = _busy_seconds(), time.monotonic() - self._started
        if busy is None or self._busy is None or elapsed <= 0:
            return None
        used = busy - self._busy - (_own_seconds() - self._own)
        return min(max(used / (elapsed * (os.cpu_count() or 1)), 0.0), 1.0)


def versions() -> dict[str, str | None]:
    """Of this program and of what computes for it; None for what is not installed."""
    found: dict[str, str | None] = {"kvpack": __version__, "python": platform.python_version()}
    return found | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _processor() -> str:
    lines = (line.partition(":") for line in _cpuinfo().splitlines())
    named = next((text.strip() for key, _, text in lines if key.strip() == "model name"), "")
    return named or platform.processor() or platform.machine()


def _flags() -> tuple[str, ...]:
    words = set(_cpuinfo().split())
    return tuple(flag for flag in (*_FLAGS, *_ARM_FLAGS) if flag in words)


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _busy_seconds() -> float | None:
    """Processor time that the whole machine has spent on anything but waiting."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        ticks = [int(word) for word in first[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _own_seconds() -> float:
    """Processor time of this process and of those that it started and that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system
