"""Memory as the system tells it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvpack.core import resident
from kvpack.core.memory import peak_memory_bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems tell nothing")
MEBIBYTE = 1 << 20


@linux
def test_own_memory_grows_and_shrinks_with_what_is_held() -> None:
    before = resident.own_bytes()
    held = bytearray(b"x") * (64 * MEBIBYTE)
    grown = resident.own_bytes()
    del held
    after = resident.own_bytes()
    assert before is not None
    assert grown is not None
    assert after is not None
    assert grown - before >= 60 * MEBIBYTE
    assert after - before <= 8 * MEBIBYTE


@linux
def test_peaks_are_counted_from_a_reset() -> None:
    if not resident.reset_peak():
        pytest.skip("this system does not reset peaks")
    held = bytearray(b"x") * (64 * MEBIBYTE)
    high = peak_memory_bytes()
    del held
    resident.own_bytes()
    resident.reset_peak()
    assert peak_memory_bytes() <= high - 32 * MEBIBYTE


@linux
def test_the_machine_has_memory() -> None:
    own, free = resident.resident_bytes(), resident.available_bytes()
    assert own is not None
    assert own > MEBIBYTE
    assert free is not None
    assert free > 0


def test_other_systems_tell_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resident, "Path", lambda name: tmp_path / "nothing" / str(name).strip("/"))
    assert resident.resident_bytes() is resident.available_bytes() is resident.own_bytes() is None
    assert not resident.reset_peak()
