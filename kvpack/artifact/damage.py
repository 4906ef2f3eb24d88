"""Hashing an artifact, and saying which tensors a damaged file has lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvpack.artifact.hashing import pieces, sha256, sound
from kvpack.artifact.manifest import Manifest, TensorRecord
from kvpack.core.errors import ArtifactError
from kvpack.core.packed_bytes import first_bad_block
from kvpack.core.progress import SILENT, Progress
from kvpack.core.safetensors_header import TensorEntry, read_header
from kvpack.core.tensor_io import read_tensor

_THREADS = min(4, os.cpu_count() or 1)
_HINT = "copy or download this file again; `kvpack export` makes the same bytes"


def check_hashes(
    folder: Path,
    manifest: Manifest,
    progress: Progress = SILENT,
    files: Iterable[str] | None = None,
    *,
    mapped: bool = False,
) -> None:
    """Read every byte of an artifact's files, or of those in `files` only.

    Args:
        folder: of the artifact.
        manifest: what it says of itself.
        progress: told of every file.
        files: names of some of its files.
        mapped: map large files instead of reading them, see `mapped_sha256`.

    Raises:
        ArtifactError: a file differs; names the file, and the tensors for weights.
    """
    names = tuple(manifest.files if files is None else files)
    tensors = {**manifest.weight_tensors(), **manifest.kv_state}
    found = {name: pieces(folder, name, manifest.files[name], tensors, mapped) for name in names}
    with ThreadPoolExecutor(_THREADS) as pool:
        # The largest first, so that no thread is left alone with one of them at the end.
        order = sorted((p for of in found.values() for p in of), key=lambda p: p.start - p.stop)
        asked = {piece: pool.submit(sound, folder, piece) for piece in order}
        for done, name in enumerate(names):
            progress("check", done, len(names), name)
            if not all(asked[piece].result() for piece in found[name]):
                pool.shutdown(cancel_futures=True)
                lost = _lost(folder / name, tensors)
                raise ArtifactError(
                    f"{name} is damaged{lost}", where=str(folder), why="its sha256 differs", hint=_HINT
                )
    progress("check", len(names), len(names))


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
        if name not in records or sha256(path, entry.start, entry.stop) != records[name].sha256
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
