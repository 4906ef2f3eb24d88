import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvpack.core.errors import ArtifactError, KvpackError, SourceError
from kvpack.core.safetensors_header import MAX_HEADER_BYTES, read_header
from kvpack.core.tensor_io import read_tensor

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}


def write(path: Path, header: Any, data: int | bytes = 11, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = bytes(data) if isinstance(data, int) else data
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_sound_file_is_read(path: Path) -> None:
    header = read_header(write(path, {"b": B, "a": A, "__metadata__": {"format": "pt"}}))
    assert list(header.tensors) == ["a", "b"]
    assert header.metadata == {"format": "pt"}
    b = header.tensors["b"]
    assert (b.shape, b.dtype, b.stop - b.start, b.stop) == ((3,), "uint8", 3, path.stat().st_size)


def test_files_of_the_reference_writer_are_read(path: Path) -> None:
    made = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4, dtype=torch.int16),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "narrow": torch.randn(7).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(made, path, metadata={"k": "v"})
    header = read_header(path)
    assert header.tensors.keys() == made.keys()
    for name, tensor in made.items():
        read = read_tensor(path, header.tensors[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read.float(), tensor.float())


BAD_HEADERS = {
    "equal keys": b'{"a":{"dtype":"U8","shape":[11],"data_offsets":[0,11]},"a":{"dtype":"I8","shape":[11],'
    b'"data_offsets":[0,11]}}',
    "equal inner keys": b'{"a":{"dtype":"U8","dtype":"I8","shape":[11],"data_offsets":[0,11]}}',
    "overlap": {"a": A, "b": {**B, "shape": [4], "data_offsets": [7, 11]}},
    "gap": {"a": A, "b": {**B, "shape": [2], "data_offsets": [9, 11]}},
    "starts late": {"a": {**A, "data_offsets": [3, 11]}},
    "same place": {"a": A, "b": {**A}, "c": B},
    "bytes after": {"a": A},
    "shape and offsets differ": {"a": A, "b": {**B, "shape": [4]}},
    "product wraps to 8 in 64 bits": {"a": {**A, "shape": [2**32, 2**32, 2]}, "b": B},
    "dimension 2^63": {"a": {**A, "shape": [2**63]}, "b": B},
    "zero times huge": {
        "a": A,
        "b": B,
        "c": {"dtype": "U8", "shape": [0, 2**62, 4], "data_offsets": [11, 11]},
    },
    "many dimensions": {"a": {**A, "shape": [2, *[1] * 100]}, "b": B},
    "negative dimensions": {"a": {**A, "shape": [-1, -2]}, "b": B},
    "negative offset": {"a": A, "b": {**B, "data_offsets": [-3, 0]}},
    "offsets swapped": {"a": A, "b": {**B, "data_offsets": [11, 8]}},
    "three offsets": {"a": A, "b": {**B, "data_offsets": [8, 9, 11]}},
    "offset 2^64": {"a": A, "b": {**B, "data_offsets": [8, 2**64 + 11]}},
    "offset of 4000 digits": b'{"a":{"dtype":"U8","shape":[11],"data_offsets":[0,1' + b"0" * 4000 + b"]}}",
    "float shape": {"a": {**A, "shape": [2.0]}, "b": B},
    "true shape": {"a": A, "b": {**B, "shape": [3, True]}},
    "unknown dtype": {"a": {**A, "dtype": "Q4"}, "b": B},
    "dtype is a list": {"a": {**A, "dtype": ["F32"]}, "b": B},
    "unknown field": {"a": {**A, "code": "x"}, "b": B},
    "missing field": {"a": {"dtype": "F32", "shape": [2]}, "b": B},
    "entry is a list": {"a": [A]},
    "NUL in a name": {"a\0": A, "b": B},
    "empty name": {"": A, "b": B},
    "half a surrogate in a name": b'{"\\ud800":{"dtype":"U8","shape":[11],"data_offsets":[0,11]}}',
    "not UTF-8": b'{"\xff":{"dtype":"U8","shape":[11],"data_offsets":[0,11]}}',
    "metadata is no text": {"a": A, "b": B, "__metadata__": {"n": 1}},
    "metadata is a list": {"a": A, "b": B, "__metadata__": []},
    "a list": b"[]",
    "leading space": b' {"a":{"dtype":"U8","shape":[11],"data_offsets":[0,11]}}',
    "empty": b"",
    "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,11]}}',
    "more than one value": b"{}{}",
    "5000 digits": b'{"a":{"dtype":"U8","shape":[' + b"1" * 5000 + b'],"data_offsets":[0,11]}}',
    "depth bomb": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "object depth bomb": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "depth that the parser survives": b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
}


@pytest.mark.parametrize("error", [ArtifactError, SourceError])
@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_bad_header_is_refused_by_name_and_at_once(
    path: Path, header: Any, error: type[KvpackError]
) -> None:
    write(path, header)
    start = time.process_time()
    with pytest.raises(error) as caught:
        read_header(path, error=error)
    assert time.process_time() - start < 1
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_truncated_says_how_much_is_missing(path: Path) -> None:
    write(path, {"a": A, "b": B})
    size = path.stat().st_size
    os.truncate(path, size - 4)
    message = f"model.safetensors is {size - 4} bytes, its header needs {size}"
    with pytest.raises(SourceError, match=re.escape(message)):
        read_header(path, error=SourceError)


def test_cut_at_every_byte_or_extended(path: Path) -> None:
    whole = write(path, {"a": A, "b": B}).read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match=r"is \d+ bytes, its header needs"):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ArtifactError, match="1 bytes after its last tensor"):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_header_length_that_lies(path: Path, length: int) -> None:
    with pytest.raises(ArtifactError):
        read_header(write(path, {"a": A, "b": B}, length=length))


def test_an_oversize_header_is_refused_unread(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER_BYTES + 100)  # a hole: no disk, no time
    with pytest.raises(ArtifactError, match="header of 100,000,001 bytes"):
        read_header(path)


def test_missing_and_folder(tmp_path: Path) -> None:
    for name in ("nothing", "."):
        with pytest.raises(SourceError, match="cannot be read"):
            read_header(tmp_path / name, error=SourceError)


def test_a_hundred_thousand_tensors(path: Path) -> None:
    header = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(100_000)}
    write(path, header, 100_000)
    start = time.process_time()
    assert len(read_header(path).tensors) == 100_000
    assert time.process_time() - start < 10
    header["t99999"]["data_offsets"] = [99_998, 99_999]
    with pytest.raises(ArtifactError, match="overlaps"):
        read_header(write(path, header, 100_000))


def test_a_file_that_shrinks_after_its_check(path: Path) -> None:
    entry = read_header(write(path, {"a": A, "b": B})).tensors["b"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SourceError, match="ends at byte"):
        read_tensor(path, entry, error=SourceError)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 2),
)
def test_mutated_files_are_refused_or_read_as_the_reference_does(path: Path, edits, cut) -> None:
    whole = bytearray(write(path, {"a": A, "b": B}).read_bytes())
    for position, value in edits:
        whole[position % len(whole)] = value
    path.write_bytes(whole[: len(whole) - cut])
    try:
        header = read_header(path)
    except ArtifactError:
        return
    try:
        with safe_open(path, "pt") as reference:
            shapes = {name: tuple(reference.get_slice(name).get_shape()) for name in reference.keys()}  # noqa: SIM118
    except SafetensorError as error:
        pytest.fail(f"accepted what the reference refuses: {error}")
    assert shapes == {name: entry.shape for name, entry in header.tensors.items()}
