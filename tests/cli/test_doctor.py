"""`kvpack doctor`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpack.cli.doctor import _package
from tests.cli.conftest import Kvpack


def test_a_healthy_machine_passes(run_kvpack: Kvpack, tmp_path: Path) -> None:
    checks = {c["name"]: c for c in run_kvpack("doctor", str(tmp_path), "--json").json["data"]["checks"]}
    assert {"python", "cpu", "disk", "fsync", "write and rename", "bundled recipes"} <= checks.keys()
    assert checks["fsync"]["found"].endswith("ms")
    assert list(tmp_path.iterdir()) == [], "it cleans up behind itself"


@pytest.mark.skipif(
    os.name == "nt" or (os.geteuid() == 0 and not Path("/proc/1").exists()), reason="needs /proc"
)
def test_a_folder_that_cannot_be_written_fails(run_kvpack: Kvpack) -> None:
    done = run_kvpack("doctor", "/proc", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "E_CHECK"
    status = {c["name"]: c["status"] for c in done.json["data"]["checks"]}
    assert status["write and rename"] == "failed"


def test_versions_are_held_against_their_ranges() -> None:
    assert _package("pytest>=1").status == "ok"
    assert _package("pytest<1").status == "failed"
    missing = _package("no-such-package-here>=1")
    assert (missing.status, missing.found) == ("failed", "missing")
    assert "pip install" in missing.hint
