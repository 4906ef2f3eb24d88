"""`kvpack verify` as a user runs it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Kvpack

PROGRESS = re.compile(
    r"(check|decode|compare|evaluate) \d+/\d+(, \d+:\d+ left)?, peak \d+\.\d\d GiB(  \S.*)?"
)


def test_nothing_but_the_result_and_progress_is_printed(
    run_kvpack: Kvpack, tiny_artifact: str, tiny_source: str
) -> None:
    done = run_kvpack("verify", tiny_artifact, "--source", tiny_source, OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    rows = [line.split()[:2] for line in done.out.splitlines()]
    assert rows == [
        ["check"],
        ["files", "ok"],
        ["decode", "ok"],
        ["source", "ok"],
        ["logits", "ok"],
        ["PASS"],
    ]
    assert "\x1b" not in done.out + done.err
    for line in done.err.splitlines():
        assert PROGRESS.fullmatch(line), line


def test_quiet_means_silent(call_kvpack: Kvpack, tiny_artifact: str) -> None:
    done = call_kvpack("verify", tiny_artifact, "--quiet")
    assert done.code == 0
    assert done.err == ""


def test_json(call_kvpack: Kvpack, tiny_artifact: str) -> None:
    data = call_kvpack("verify", tiny_artifact, "--json").json["data"]
    assert data["passed"] is True
    assert [check["name"] for check in data["checks"]] == ["files", "decode", "logits"]
    assert all(
        check.keys() == {"name", "passed", "detail", "hint"} and check["passed"] for check in data["checks"]
    )


@pytest.fixture
def damaged(tiny_artifact: str, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(tiny_artifact, tmp_path / "damaged"))
    shard = next(path.glob("kvpack-0*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return path


def test_a_failed_check_is_an_answer(call_kvpack: Kvpack, damaged: Path) -> None:
    done = call_kvpack("verify", str(damaged), "--json")
    assert done.code == 1
    assert done.json["data"]["passed"] is False
    (check,) = done.json["data"]["checks"]
    assert not check["passed"]
    assert re.search(r"safetensors is damaged: model\.\S+; the other \d+ tensors", check["detail"])
    assert done.json["error"]["code"] == "E_CHECK"
    assert done.json["error"]["message"] == f"files: {check['detail']}"
    assert done.json["error"]["hint"] == check["hint"] != ""


def test_a_failed_check_for_people(call_kvpack: Kvpack, damaged: Path) -> None:
    done = call_kvpack("verify", str(damaged))
    assert done.code == 1
    assert done.out.splitlines()[-1] == "FAIL"
    assert "FAILED" in done.out
    error, hint = done.err.splitlines()[-2:]
    assert error.startswith(f"error: files: {damaged}: kvpack-")
    assert hint.startswith("  hint: copy or download this file again")


def test_another_source_fails_and_a_missing_one_cannot_be_used(
    call_kvpack: Kvpack, tiny_artifact: str, demo_model: str, tmp_path: Path
) -> None:
    other = call_kvpack("verify", tiny_artifact, "--source", demo_model, "--json")
    assert other.code == 1
    assert other.json["data"]["checks"][-1]["name"] == "source"
    missing = call_kvpack("verify", tiny_artifact, "--source", str(tmp_path), "--json")
    assert missing.code == 4
    assert missing.json["error"]["code"] == "E_SOURCE"
    assert missing.json["data"] is None
