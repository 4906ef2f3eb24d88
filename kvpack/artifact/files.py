"""Files that are hashed while they are written, and are on the disk when they are closed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

from kvpack.artifact.manifest import FileRecord
from kvpack.core.atomic import writing

BUFFER_BYTES = 4 << 20


class HashedFile:
    """A new file; errors of the disk become errors that say what to do."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self._digest = hashlib.sha256()
        with writing(path):
            self._stream = path.open("xb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        """Append `data` whole."""
        view, done = memoryview(data), 0
        with writing(self.path):
            while done < len(view):
                done += self._stream.write(view[done:]) or 0
        self._digest.update(view)
        self.bytes += len(view)

    def close(self) -> FileRecord:
        """Flush to the disk.

        Returns:
            Size and hash of what was written.
        """
        with writing(self.path):
            os.fsync(self._stream.fileno())
            self._stream.close()
        return FileRecord(self.bytes, self._digest.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
