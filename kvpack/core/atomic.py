"""A folder that appears complete or not at all.

Work happens in ``.<name>.partial`` beside the target, under a lock. One rename makes the target
appear; a folder that it replaces is first renamed to ``.<name>.replaced`` and removed after. What
a killed writer left of these, the next writer of the same target repairs.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvpack.core.errors import KvpackError, ResourceError, UsageError
from kvpack.core.lock import Lock

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""System errors that mean: this disk does not take the file."""

_FORBIDDEN = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG}
)

_OURS = ("kvpack.json", "calibration.json")
"""What tells a folder that `--force` may replace from one that it may not."""


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a scratch folder beside `target`; on success it becomes `target` by one rename.

    On any error the disk is as it was; system errors become errors that say what to do.

    Args:
        target: the folder to make.
        force: replace `target` if it exists and kvpack made it.

    Raises:
        UsageError: `target` exists and may not be replaced, or another process is writing it.
        ResourceError: the disk is full.
    """
    folder = NewFolder(target, force=force)
    try:
        with writing(target):
            folder.open()
            yield folder.scratch
            folder.commit()
    finally:
        folder.abandon()


class NewFolder:
    """The life of one output folder: `open`, then `commit` or `abandon`."""

    def __init__(self, target: Path, *, force: bool = False) -> None:
        self.target = Path(os.path.realpath(target))
        self.scratch = self.target.with_name(f".{self.target.name}.partial")
        self._replaced = self.target.with_name(f".{self.target.name}.replaced")
        self._force = force
        self._lock = Lock(self.target)
        self._parents: list[Path] = []

    def open(self) -> None:
        """Make the scratch folder; errors as of `new_folder`."""
        try:
            with writing(self.target):
                self._make_parents()
                self._lock.acquire()
                self._repair()
                check_free(self.target, force=self._force)
                self.scratch.mkdir()
        except BaseException:
            self.abandon()
            raise

    def commit(self) -> None:
        """Put everything on the disk and give the scratch folder its name."""
        with writing(self.target):
            _sync_tree(self.scratch)
            self._rename()
            _sync(self.target.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self._parents.clear()
        self._lock.release()

    def abandon(self) -> None:
        """Leave the disk as it was; does nothing after `commit`."""
        if self._lock.held:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self._lock.release()
        with suppress(OSError):  # someone else put something there: it stays
            for folder in reversed(self._parents):
                folder.rmdir()
        self._parents.clear()

    def _make_parents(self) -> None:
        for folder in reversed([p for p in self.target.parents if not p.exists()]):
            folder.mkdir(exist_ok=True)
            self._parents.append(folder)

    def _repair(self) -> None:
        """Undo or finish what a killed writer began; that we hold the lock says that it is dead."""
        if self._replaced.exists():
            if self.target.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self.target)
        if self.scratch.exists():
            shutil.rmtree(self.scratch)

    def _rename(self) -> None:
        if not self.target.exists():
            self.scratch.rename(self.target)
            return
        self.target.rename(self._replaced)
        try:
            self.scratch.rename(self.target)
        except BaseException:
            if not self.target.exists():
                self._replaced.rename(self.target)
            raise


def check_free(target: Path, *, force: bool = False) -> None:
    """Refuse a target that exists, unless it may be replaced.

    Raises:
        UsageError: something is at `target`, and `force` is not given or kvpack did not make it.
    """
    if not os.path.lexists(target):
        return
    if not force:
        raise UsageError(
            "exists already", where=str(target), hint="choose another folder with -o, or pass --force"
        )
    if not target.is_dir():
        raise UsageError("is a file, not a folder", where=str(target), hint="choose another folder with -o")
    if any(target.iterdir()) and not any((target / name).is_file() for name in _OURS):
        raise UsageError(
            "was not made by kvpack",
            where=str(target),
            why="--force replaces the whole folder",
            hint="choose another folder with -o",
        )


def require_space(target: Path, nbytes: int) -> None:
    """Refuse before any work when the disk under `target` cannot take `nbytes`.

    Raises:
        ResourceError: with the bytes needed and free.
    """
    folder = Path(os.path.abspath(target)).parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ResourceError(
            f"needs {nbytes:,} bytes, {free:,} are free",
            where=str(folder),
            why="nothing was changed",
            hint="free some space, or choose another disk with -o",
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn system errors of the enclosed writes into errors that say what to do."""
    try:
        yield
    except OSError as error:
        raise _explained(error, path) from error


def _explained(error: OSError, path: Path) -> KvpackError:
    reason, where = error.strerror or str(error), str(error.filename or path)
    if error.errno in _FORBIDDEN:
        return UsageError(f"cannot be written: {reason}", where=where, hint="choose another folder with -o")
    full = error.errno in NO_SPACE
    return ResourceError(
        f"the disk does not take it: {reason}" if full else f"cannot be written: {reason}",
        where=where,
        why="nothing was changed",
        hint="free some space, or choose another disk with -o",
    )


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Flush to disk; systems that cannot sync a folder are let off."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
