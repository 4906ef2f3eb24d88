"""Which names a file of an artifact may have, and which files a folder really holds."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from kvpack.core.errors import ArtifactError, KvpackError

MAX_NAME_BYTES = 255


def check_name(name: str, *, where: str, error: type[KvpackError] = ArtifactError) -> str:
    """Accept a file name relative to its folder: visible names joined by "/", nothing that escapes.

    Raises:
        KvpackError: of class `error`; absolute, hidden, with "..", backslash, colon or control
            characters, not in Unicode's composed form, or too long.
    """
    segments = name.split("/")
    sound = (
        all(s and s[0] not in ". " and s[-1] not in ". " for s in segments)
        and not any(c in '\\:*?"<>|' or unicodedata.category(c).startswith("C") for c in name)
        and unicodedata.is_normalized("NFC", name)
        and all(len(s.encode("utf-8")) <= MAX_NAME_BYTES for s in segments)
    )
    if not sound:
        raise error(f"{name[:200]!r} is not a file name that an artifact may have", where=where)
    return name


def contained(folder: Path, path: Path) -> bool:
    """Whether a path, links followed, stays in `folder` or in the hub cache that `folder` is a view of.

    A snapshot of the hub cache is a folder of links into ``../../blobs``; no other links leave.
    """
    real, home = os.path.realpath(path), os.path.realpath(folder)
    homes = [home]
    if Path(home).parent.name == "snapshots":
        homes.append(str(Path(home).parent.parent / "blobs"))
    return any(real.startswith(h + os.sep) for h in homes)


def member(folder: Path, name: str) -> Path:
    """The file of an artifact with a checked name.

    Raises:
        ArtifactError: it is missing, not a plain file, or a link other than the hub cache's.
    """
    path = folder / check_name(name, where=str(folder))
    if not path.exists():
        raise ArtifactError(
            f"{name} is missing", where=str(folder), hint="copy or download the artifact again"
        )
    linked = os.path.realpath(path) != os.path.join(os.path.realpath(folder), *name.split("/"))
    in_cache = Path(os.path.realpath(folder)).parent.name == "snapshots" and contained(folder, path)
    if not path.is_file() or (linked and not in_cache):
        kind = "a symbolic link" if linked else "not a plain file"
        raise ArtifactError(
            f"{name} is {kind}", where=str(folder), why="an artifact's files stand in its own folder"
        )
    return path


def visible_files(folder: Path) -> list[str]:
    """Names of everything in a folder that is not hidden, "/" between levels, sorted; links not followed."""
    found: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        links = [f for f in folders if os.path.islink(os.path.join(root, f))]
        paths = [os.path.join(root, f) for f in (*files, *links) if not f.startswith(".")]
        found += [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
    return sorted(found)
