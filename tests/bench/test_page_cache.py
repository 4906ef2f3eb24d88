import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpack.bench import page_cache


def test_files_of_a_folder_are_dropped_and_whole(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "empty").touch()
    data = os.urandom(1 << 20)
    (tmp_path / "model.safetensors").write_bytes(data)
    page_cache.read_through(tmp_path)
    # Not every file system can; that it says so is what matters.
    assert page_cache.drop(tmp_path) in (True, False)
    assert (tmp_path / "model.safetensors").read_bytes() == data


def test_advice_is_given_for_every_file_and_believed_if_nothing_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 100)
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: given.append(arguments), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(page_cache, "_held", lambda file: 0)
    assert page_cache.drop(tmp_path)
    assert [arguments[1:] for arguments in given] == [(0, 0, 4)] * 2
    monkeypatch.setattr(page_cache, "_held", lambda file: 50)
    assert not page_cache.drop(tmp_path)


def test_where_nothing_can_be_dropped_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")

    def refuse(*arguments: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    assert not page_cache.drop(tmp_path)
    monkeypatch.delattr(os, "posix_fadvise")
    assert not page_cache.drop(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_bytes_in_memory_are_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    (tmp_path / "empty").touch()
    with (tmp_path / "file").open("rb") as stream, (tmp_path / "empty").open("rb") as empty:
        assert page_cache._held(stream.fileno()) >= 10_000
        assert page_cache._held(empty.fileno()) == 0
