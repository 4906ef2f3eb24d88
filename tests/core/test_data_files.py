"""Bundled data is found in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpack.core import data_files
from kvpack.core.errors import KvpackError


def test_checkout() -> None:
    assert (data_files.data_dir("recipes") / "kivi.yaml").is_file()
    assert data_files.data_dir("calibration").is_dir()


def test_wheel_wins_over_a_folder_that_happens_to_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "kvpack" / "_data" / "recipes"
    inside.mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(data_files, "PACKAGE", tmp_path / "kvpack")
    assert data_files.data_dir("recipes") == inside
    with pytest.raises(KvpackError, match="no 'calibration' data"):
        data_files.data_dir("calibration")
