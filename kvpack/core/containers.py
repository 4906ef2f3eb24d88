"""Memory that a container leaves this process: limits of Linux control groups, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class _Names(NamedTuple):
    """Where a version of control groups keeps its figures."""

    root: str
    limit: str
    used: str
    cached: str


_ONE = _Names("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_TWO = _Names("", "memory.max", "memory.current", "inactive_file")


def room(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that may still be used in the control groups of this process; None where nothing limits it.

    What the system holds of files, and would give back, counts as free.
    """
    found = [left for folder, names in _folders(proc, groups) if (left := _left(folder, names)) is not None]
    return max(0, min(found)) if found else None


def _folders(proc: Path, groups: Path) -> Iterator[tuple[Path, _Names]]:
    """Folders of the groups that this process is in, and of those around them."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _ONE if controllers else _TWO
        inside = PurePosixPath(path.lstrip("/"))
        # A container may see its own group as the root, whatever its path says.
        for part in (inside, *inside.parents):
            yield groups / names.root / part, names


def _left(folder: Path, names: _Names) -> int | None:
    limit, used = _text(folder / names.limit).strip(), _text(folder / names.used).strip()
    if not limit.isdigit() or not used.isdigit():
        return None
    lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
    cached = next((int(words[1]) for words in lines if words[0] == names.cached), 0)
    return int(limit) - int(used) + cached


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
