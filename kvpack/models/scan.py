"""One pass over the weights before any work: no NaN, no Inf, and a hash of every file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path

import torch

from kvpack.core.ahead import in_order
from kvpack.core.errors import SourceError
from kvpack.core.model_spec import ModelSpec
from kvpack.core.progress import SILENT, Progress, paced
from kvpack.core.safetensors_header import read_header

CHUNK_BYTES = 1 << 20
_FLOATS = {"float64", "float32", "float16", "bfloat16"}


def scan(spec: ModelSpec, progress: Progress = SILENT) -> dict[str, str]:
    """Read every weight file once, in chunks.

    Returns:
        File name -> sha256, for every shard.

    Raises:
        SourceError: a tensor holds NaN or Inf, or a file is truncated.
    """
    hashes: dict[str, str] = {}
    found = in_order(partial(_scan_file, spec, spec.path / file) for file in spec.files)
    tell, read = paced(progress, "check", len(spec.files), "MB/s"), 0.0
    for done, file in enumerate(spec.files):
        tell(done, read, file)
        hashes[file] = next(found)
        read += (spec.path / file).stat().st_size / 1e6
    tell(len(spec.files), read)
    return hashes


def _scan_file(spec: ModelSpec, path: Path) -> str:
    entries = sorted(read_header(path, error=SourceError).tensors.items(), key=lambda e: e[1].start)
    used = {t.stored_name or n for n, t in spec.tensors.items() if n not in spec.ignored}
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for name, entry in entries:
            _hash_until(stream, digest, entry.start)
            dtype = entry.dtype if entry.dtype in _FLOATS and name in used else None
            _scan_tensor(stream, digest, name, entry.stop, dtype)
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _hash_until(stream: BufferedReader, digest: hashlib._Hash, stop: int) -> None:
    digest.update(stream.read(stop - stream.tell()))


def _scan_tensor(
    stream: BufferedReader, digest: hashlib._Hash, name: str, stop: int, dtype: str | None
) -> None:
    bad, first, seen = 0, -1, 0
    for chunk in _chunks(stream, stop, name):
        digest.update(chunk)
        if dtype is None:
            continue
        values = torch.frombuffer(chunk, dtype=getattr(torch, dtype))
        # NaN is the least and the greatest number of any chunk that holds one.
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):
            wrong = (~torch.isfinite(values)).nonzero()
            first = first if bad else seen + int(wrong[0])
            bad += len(wrong)
        seen += values.numel()
    if bad:
        raise SourceError(
            f"{name} holds {bad} NaN or Inf values, the first at flat index {first}",
            where=stream.name,
            why="every statistic and code computed from them would be meaningless",
            hint="repair or replace the checkpoint",
        )


def _chunks(stream: BufferedReader, stop: int, name: str) -> Iterator[memoryview]:
    """What comes until `stop`; every chunk is in the place of the one before."""
    left = stop - stream.tell()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, left)))
    while left:
        count = stream.readinto(buffer[:left])
        if not count:
            raise SourceError(f"ends inside tensor {name}", where=stream.name, hint="download it again")
        left -= count
        yield buffer[:count]
