import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest

from kvpack.artifact import hashing
from kvpack.artifact.damage import check_hashes
from kvpack.artifact.reader import read_manifest
from kvpack.core.errors import ArtifactError
from kvpack.core.safetensors_header import read_header


@pytest.fixture
def large(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact whose weight files are all large enough to be hashed in pieces."""
    monkeypatch.setattr(hashing, "LARGE_BYTES", 0)
    return artifact


def shard(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("kvpack-0*.safetensors"))))


def pieces_of(folder: Path) -> tuple[hashing.Piece, ...]:
    manifest, path = read_manifest(folder), shard(folder)
    return hashing.pieces(folder, path.name, manifest.files[path.name], manifest.weight_tensors(), True)


def test_pieces_and_the_header_are_the_whole_file(large: Path) -> None:
    found, path = pieces_of(large), shard(large)
    assert len(found) > 1
    ends = [(piece.start, piece.stop) for piece in found]
    assert all(before[1] == after[0] for before, after in pairwise(ends))
    assert ends[0][0] == 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert ends[-1][1] == path.stat().st_size
    check_hashes(large, read_manifest(large), mapped=True)


def test_small_files_are_hashed_as_one(artifact: Path) -> None:
    assert len(pieces_of(artifact)) == 1


@pytest.mark.parametrize("mapped", [False, True])
def test_one_flipped_bit_anywhere_is_found_in_pieces(large: Path, mapped: bool) -> None:
    path, manifest = shard(large), read_manifest(large)
    data = path.read_bytes()
    step = max(1, len(data) // 100)
    for position in (*range(0, len(data), step), len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ArtifactError, match=path.name):
            check_hashes(large, manifest, mapped=mapped)
    path.write_bytes(data)
    check_hashes(large, manifest, mapped=mapped)


def test_a_damaged_tensor_is_named(large: Path) -> None:
    path, manifest = shard(large), read_manifest(large)
    place = pieces_of(large)[-1]
    name = list(read_header(path).tensors)[-1]
    data = bytearray(path.read_bytes())
    data[place.start] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"is damaged: {name}; the other"):
        check_hashes(large, manifest, mapped=True)


def test_a_header_of_another_spelling_needs_the_hash_of_the_file(large: Path) -> None:
    path = shard(large)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    spelled = json.dumps(json.loads(data[8 : 8 + length]), indent=1).encode()
    path.write_bytes(len(spelled).to_bytes(8, "little") + spelled + data[8 + length :])
    assert len(pieces_of(large)) == 1
    with pytest.raises(ArtifactError, match="damaged"):
        check_hashes(large, read_manifest(large), mapped=True)


def test_mapped_and_read_bytes_have_the_same_hash(tmp_path: Path) -> None:
    path, data = tmp_path / "file", bytes(range(256)) * 700
    path.write_bytes(data)
    for start, stop in ((0, len(data)), (1, 2), (70_001, 140_003), (5, 5)):
        expected = hashlib.sha256(data[start:stop]).hexdigest()
        assert hashing.sha256(path, start, stop) == expected
        assert hashing.mapped_sha256(path, start, stop) == expected


def test_a_file_that_has_become_shorter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="cannot be read"):
        hashing.mapped_sha256(tmp_path / "file", 0, 500_000)
    with pytest.raises(ArtifactError, match="cannot be read"):
        hashing.mapped_sha256(tmp_path / "missing", 0, 5)
