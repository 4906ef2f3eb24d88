"""One writer per target: a lock that the system releases when its owner dies, however it dies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvpack.core.errors import UsageError


class Lock:
    """A locked, hidden file beside `target` that holds its owner's process id.

    Windows gets the file but no exclusion.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.lock")
        self._descriptor = -1

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor >= 0

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UsageError: another process holds it.
            OSError: the file cannot be made or the file system has no locks.
        """
        while not self.held:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(descriptor)
                # An earlier owner may have removed the file between our open and our lock; the
                # lock would then be on a file that the next writer does not see.
                if self._is_current(descriptor):
                    self._descriptor = descriptor
            finally:
                if not self.held:
                    os.close(descriptor)
        try:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, str(os.getpid()).encode())
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Remove the file and let go of it."""
        if self.held:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self, descriptor: int) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise UsageError(
                f"another kvpack (process {owner}) is writing it",
                where=str(self.target),
                hint="wait for it, or choose another folder",
            ) from None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False
