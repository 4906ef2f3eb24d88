from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpack.core.errors import UsageError
from kvpack.core.new_file import check_free_file, write_text


def test_written_whole_with_ordinary_rights(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode
    write_text(path, "new")
    assert path.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "plain"]


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.html"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    check_free_file(path, "--report")
    path.write_text("old")
    with pytest.raises(UsageError, match="exists already"):
        check_free_file(path, "--report")
    check_free_file(path, "--report", force=True)
    with pytest.raises(UsageError, match="is a folder"):
        check_free_file(tmp_path, "--report", force=True)
    with pytest.raises(UsageError, match="its folder does not exist"):
        check_free_file(tmp_path / "no" / "a.html", "--report")
