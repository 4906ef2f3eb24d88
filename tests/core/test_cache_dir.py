"""Where caches are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvpack.core.cache_dir import cache_dir


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVPACK_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("linux", "/home/me/.cache/kvpack"),
        ("darwin", "/home/me/Library/Caches/kvpack"),
        ("win32", "/home/me/AppData/Local/kvpack/cache"),
    ],
)
def test_platforms(platform: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_dir() == Path(expected)


def test_what_is_chosen_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path("/home/me/.cache/kvpack")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/kvpack")
    monkeypatch.setenv("KVPACK_CACHE", "/mine")
    assert cache_dir() == Path("/mine")
    assert cache_dir(Path("here")) == Path("here")
