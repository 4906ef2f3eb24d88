"""Hashing an artifact, and saying which tensors a damaged file has lost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvpack.artifact.files import BUFFER_BYTES
from kvpack.artifact.manifest import Manifest, TensorRecord
from kvpack.core.errors import ArtifactError
from kvpack.core.packed_bytes import first_bad_block
from kvpack.core.progress import SILENT, Progress
from kvpack.core.safetensors_header import TensorEntry, read_header
from kvpack.core.tensor_io import read_tensor

_THREADS = min(4, os.cpu_count() or 1)
_HINT = "copy or download this file again; `kvpack export` makes the same bytes"


def check_hashes(
    folder: Path, manifest: Manifest, progress: Progress = SILENT, files: Iterable[str] | None = None
) -> None:
    """Read every byte of an artifact's files, or of those in `files` only.

    Raises:
        ArtifactError: a file differs; names the file, and the tensors for weights.
    """
    names = tuple(manifest.files if files is None else files)
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda name: _sha256(folder / name, 0, manifest.files[name].bytes), names)
        for done, (name, found) in enumerate(zip(names, hashes, strict=True)):
            progress("check", done, len(names), name)
            if found != manifest.files[name].sha256:
                pool.shutdown(cancel_futures=True)
                lost = _lost(folder / name, {**manifest.weight_tensors(), **manifest.kv_state})
                raise ArtifactError(
                    f"{name} is damaged{lost}", where=str(folder), why="its sha256 differs", hint=_HINT
                )
    progress("check", len(names), len(names))


def _sha256(path: Path, start: int, stop: int) -> str:
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


def _lost(path: Path, records: Mapping[str, TensorRecord]) -> str:
    """`: tensors a, b; the other 362 are intact`, as far as the file still tells."""
    if path.suffix != ".safetensors":
        return ""
    try:
        entries = read_header(path).tensors
    except ArtifactError:
        return " in its header"
    bad = [
        name
        for name, entry in entries.items()
        if name not in records or _sha256(path, entry.start, entry.stop) != records[name].sha256
    ]
    if not bad:
        return " in its header"
    shown = [name + _lost_block(path, entries[name], records.get(name)) for name in bad[:5]]
    names = ", ".join(shown) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    return f": {names}; the other {len(records) - len(bad)} tensors are not affected"


def _lost_block(path: Path, entry: TensorEntry, record: TensorRecord | None) -> str:
    """` (block 3 of 7)` of a packed tensor."""
    if record is None or record.packed is None or not record.matches(entry):
        return ""
    found = first_bad_block(read_tensor(path, entry), record.packed)
    return "" if found is None else f" (block {found} of {len(record.packed.sizes)})"
