"""SHA-256 of an artifact's files, by several threads where a file is large.

The hash of a file can only be computed front to back, on one core. A large weight file is hashed tensor
by tensor instead, with the hashes that the manifest has of every tensor, and its header is compared with
the one that these tensors have. Together that is every byte of the file. A header that is spelled in another
way than kvpack spells it leads to the hash of the whole file.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvpack.artifact.files import BUFFER_BYTES
from kvpack.artifact.manifest import FileRecord, TensorRecord
from kvpack.artifact.tensor_file import header_bytes
from kvpack.core.errors import ArtifactError
from kvpack.core.safetensors_header import read_header

LARGE_BYTES = 16 << 20
"""Weight files from here on are hashed in pieces."""


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of the file `name`, and their hash."""

    name: str
    start: int
    stop: int
    sha256: str
    mapped: bool = False


def whole(name: str, record: FileRecord) -> Piece:
    """A file as one piece."""
    return Piece(name, 0, record.bytes, record.sha256)


def pieces(
    folder: Path, name: str, record: FileRecord, tensors: Mapping[str, TensorRecord], mapped: bool = False
) -> tuple[Piece, ...]:
    """What to hash of a file: its `tensors` where all else in it follows from them, else all as one.

    `mapped` tells how tensors are to be hashed.
    """
    path = folder / name
    if path.suffix != ".safetensors" or record.bytes < LARGE_BYTES:
        return (whole(name, record),)
    try:
        entries = read_header(path).tensors
        with path.open("rb") as stream:
            header = stream.read(min((entry.start for entry in entries.values()), default=0))
    except (ArtifactError, OSError):
        return (whole(name, record),)
    known = all(n in tensors and tensors[n].matches(entry) for n, entry in entries.items())
    if not known or header != header_bytes(entries):
        return (whole(name, record),)
    return tuple(Piece(name, e.start, e.stop, tensors[n].sha256, mapped) for n, e in entries.items())


def sound(folder: Path, piece: Piece) -> bool:
    """Whether a piece has its hash.

    Raises:
        ArtifactError: the file cannot be read.
    """
    digest = mapped_sha256 if piece.mapped else sha256
    return digest(folder / piece.name, piece.start, piece.stop) == piece.sha256


def sha256(path: Path, start: int, stop: int) -> str:
    """Hash of bytes `start` to `stop` of a file, which are read.

    Raises:
        ArtifactError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            while start < stop and (chunk := stream.read(min(BUFFER_BYTES, stop - start))):
                digest.update(chunk)
                start += len(chunk)
    except OSError as problem:
        raise ArtifactError(f"cannot be read: {problem.strerror}", where=str(path)) from problem
    return digest.hexdigest()


def mapped_sha256(path: Path, start: int, stop: int) -> str:
    """The same of a mapping, in one go: other threads' Python code never holds it up.

    Read in chunks, a thread waits for Python's lock after every one while another thread computes in
    Python: hashing and the rest of loading took turns. What is hashed here transformers maps right
    afterwards, so a file that shrinks meanwhile is no new danger.

    Raises:
        ArtifactError: it cannot be mapped.
    """
    if start == stop:
        return hashlib.sha256().hexdigest()
    before = start % mmap.ALLOCATIONGRANULARITY
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(
                stream.fileno(), stop - start + before, access=mmap.ACCESS_READ, offset=start - before
            ) as held,
        ):
            if hasattr(held, "madvise"):
                held.madvise(mmap.MADV_WILLNEED)
            with memoryview(held) as view, view[before:] as wanted:
                return hashlib.sha256(wanted).hexdigest()
    except (OSError, ValueError) as problem:  # a file that has become shorter is a ValueError
        raise ArtifactError(f"cannot be read: {problem}", where=str(path)) from problem
