"""A text file that appears complete or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from kvpack.core.atomic import writing
from kvpack.core.errors import UsageError


def check_free_file(target: Path, option: str, *, force: bool = False) -> None:
    """Refuse a file that exists unless it may be replaced, and one whose folder is not there.

    Args:
        target: the file.
        option: the command's option that names it, for hints.
        force: replace it if it exists.

    Raises:
        UsageError: with what to do about it.
    """
    hint = f"choose another file with {option}"
    if target.is_dir():
        raise UsageError("is a folder", where=str(target), hint=hint)
    if os.path.lexists(target) and not force:
        raise UsageError("exists already", where=str(target), hint=f"{hint}, or pass --force")
    if not target.absolute().parent.is_dir():
        raise UsageError(
            "cannot be written: its folder does not exist", where=str(target), hint=f"make it, or {hint}"
        )


def write_text(target: Path, text: str) -> None:
    """Write beside `target`, then rename: a reader sees the old file or the new one.

    Raises:
        UsageError: it may not be written there.
        ResourceError: the disk is full.
    """
    with writing(target):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.absolute().parent)
        try:
            with open(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            # A new file has the rights that the umask gives, not those of a temporary one.
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(target)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
