"""Strict reading of safetensors headers, for files that nobody vouches for. No torch.

The reference reader accepts duplicate keys, the last one wins; a check by name and a loader could
then see different tensors. Here every property is checked against the real file before anything
is allocated: sizes, offsets without gap or overlap, products of shapes, names.

Format: 8 bytes little-endian header length n, n bytes of JSON, then the data. The JSON maps names
to {"dtype", "shape", "data_offsets"}, offsets counted from the start of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpack.core.errors import ArtifactError, KvpackError
from kvpack.core.strict_json import parse_json
from kvpack.core.types import ITEM_BYTES, TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 2**63 - 1
_METADATA = "__metadata__"

DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}
"""Names of dtypes in safetensors -> in torch."""


@dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """One tensor of a file: bytes `start` to `stop`, counted from the start of the file."""

    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds. `tensors` are in the order of their data."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path, *, error: type[KvpackError] = ArtifactError) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.
        error: class of the error to raise: whose fault a broken file is.

    Raises:
        KvpackError: of class `error`; unreadable, truncated, too long, or inconsistent.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                needs = f"{8 + length:,} or more" if size >= 8 and length <= MAX_HEADER_BYTES else "more"
                raise error(
                    f"{path.name} is {size:,} bytes, its header needs {needs}",
                    where=str(path.parent),
                    hint="the file is truncated or not safetensors: copy or download it again",
                )
            if length > MAX_HEADER_BYTES:
                raise error(
                    f"has a header of {length:,} bytes, allowed are {MAX_HEADER_BYTES:,}", where=str(path)
                )
            data = stream.read(length)
    except OSError as problem:
        raise error(f"cannot be read: {problem.strerror or problem}", where=str(path)) from problem
    return _Parser(path, error).header(data, size)


class _Parser:
    """Checks one header; every complaint names the file."""

    def __init__(self, path: Path, error: type[KvpackError]) -> None:
        self.path, self.error = path, error

    def wrong(self, what: str) -> KvpackError:
        return self.error(
            what, where=str(self.path), hint="the file is damaged: copy, download or export it again"
        )

    def header(self, data: bytes, size: int) -> Header:
        if data[:1] != b"{":
            raise self.wrong("its header does not start with '{'")
        content = parse_json(data, where=str(self.path), error=self.error)
        metadata = self.metadata(content.pop(_METADATA, {}))
        start = 8 + len(data)
        entries = [(name, self.entry(name, item, start)) for name, item in content.items()]
        entries.sort(key=lambda pair: (pair[1].start, pair[1].stop))
        self.check_layout(entries, start, size)
        return Header(dict(entries), metadata)

    def metadata(self, content: Any) -> dict[str, str]:
        if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
            raise self.wrong(f"{_METADATA} is not a mapping from text to text")
        return content

    def entry(self, name: str, item: Any, base: int) -> TensorEntry:
        label = repr(name[:200])
        if not name or "\0" in name:
            raise self.wrong(f"{label} is not a tensor name")
        if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.wrong(f"tensor {label} does not have exactly dtype, shape and data_offsets")
        dtype = DTYPES.get(item["dtype"]) if isinstance(item["dtype"], str) else None
        if dtype is None:
            raise self.wrong(f"tensor {label} has unknown dtype {str(item['dtype'])[:40]!r}")
        shape, offsets = item["shape"], item["data_offsets"]
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
            raise self.wrong(f"tensor {label} has an impossible shape")
        elements = 1
        for dimension in shape:
            elements *= max(dimension, 1)
            if elements * ITEM_BYTES[dtype] > _MAX_ELEMENTS:
                raise self.wrong(f"tensor {label} has a shape that no file can hold")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self.wrong(f"tensor {label} has impossible data_offsets")
        entry = TensorEntry(tuple(shape), dtype, base + offsets[0], base + offsets[1])
        if entry.nbytes != entry.stop - entry.start:
            raise self.wrong(
                f"tensor {label} needs {entry.nbytes:,} bytes for its shape, its offsets span "
                f"{entry.stop - entry.start:,}"
            )
        return entry

    def check_layout(self, entries: list[tuple[str, TensorEntry]], start: int, size: int) -> None:
        position = start
        for name, entry in entries:
            if entry.start != position:
                problem = "overlaps the tensor before it" if entry.start < position else "follows a gap"
                raise self.wrong(f"tensor {name[:200]!r} {problem}")
            position = entry.stop
        if size < position:
            raise self.error(
                f"{self.path.name} is {size:,} bytes, its header needs {position:,}",
                where=str(self.path.parent),
                hint="the file is truncated: copy or download it again",
            )
        if size > position:
            raise self.wrong(f"has {size - position:,} bytes after its last tensor")


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
