import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvpack.artifact.reader import Artifact
from kvpack.artifact.writer import ArtifactWriter
from kvpack.core.errors import ResourceError, UsageError
from kvpack.core.types import TensorSpec
from tests.artifact.conftest import snapshot, write_artifact

ROOT = Path(__file__).parents[2]


def child(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


SLOW = """
import sys, time
from pathlib import Path
from kvpack.artifact.writer import ArtifactWriter
from tests.artifact.conftest import specs_of, tensors, write_rest
with ArtifactWriter(Path(sys.argv[1]), force=True) as writer:
    made = tensors()
    print("start", flush=True)
    writer.begin_weights(specs_of(made), shard_bytes=120)
    for name, tensor in made.items():
        writer.write_tensor(name, tensor)
        print(name, flush=True)
        time.sleep(0.1)
    write_rest(writer)
    print("done", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("existing", "kills"), [(False, (1, 4)), (True, (2, 7))])
def test_killed_at_any_point_nothing_half_written_and_the_next_run_succeeds(
    tmp_path: Path, existing: bool, kills: tuple[int, ...]
) -> None:
    out = tmp_path / "out"
    if existing:
        write_artifact(out)
    for lines in kills:
        with child(SLOW, str(out)) as process:
            assert process.stdout is not None
            for _ in range(lines):
                assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
        assert out.exists() == existing
        if existing:
            Artifact.open(out)
    write_artifact(out, force=existing)
    Artifact.open(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_after_the_end_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with child(SLOW, str(out)) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "done\n":
            pass
        process.send_signal(signal.SIGKILL)
    Artifact.open(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


LIMITED = """
import resource, sys
from pathlib import Path
from kvpack.core.errors import ResourceError
from tests.artifact.conftest import snapshot, write_artifact
out, largest = Path(sys.argv[1]), int(sys.argv[2])
before = snapshot(out.parent)
for limit in range(0, largest, 120):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_artifact(out, force=True)
    except ResourceError as error:
        assert "does not take it" in str(error) and "hint: free some space" in str(error), error
        assert error.exit_code == 3
    else:
        sys.exit(f"written with a limit of {limit}")
    assert snapshot(out.parent) == before, limit
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_size_limit_hit_anywhere_changes_nothing(tmp_path: Path, existing: bool) -> None:
    write_artifact(tmp_path / "sample")
    largest = max(p.stat().st_size for p in (tmp_path / "sample").iterdir())
    folder = tmp_path / "folder"
    folder.mkdir()
    if existing:
        (tmp_path / "sample").rename(folder / "out")
    with child(LIMITED, str(folder / "out"), str(largest)) as process:
        assert process.wait(120) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_any_work(small_disk: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs 100,000 bytes, 65,536 are free"):
        ArtifactWriter(small_disk / "out", planned_bytes=100_000).__enter__()
    with pytest.raises(ResourceError, match="needs"), ArtifactWriter(small_disk / "out") as writer:
        writer.begin_weights({"x": TensorSpec((100_000,), "uint8")})
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_while_writing(small_disk: Path) -> None:
    write_artifact(small_disk / "old")
    before = snapshot(small_disk)

    def fill() -> None:
        with ArtifactWriter(small_disk / "out") as writer:
            writer.begin_weights({"x": TensorSpec((20_000,), "uint8")})
            (small_disk / "neighbour").write_bytes(bytes(16_000))
            writer.write_tensor("x", torch.zeros(20_000, dtype=torch.uint8))

    with pytest.raises(ResourceError, match="does not take it"):
        fill()
    (small_disk / "neighbour").unlink()
    assert snapshot(small_disk) == before


def test_existing_output_is_refused_before_work_and_unchanged(artifact: Path) -> None:
    before = snapshot(artifact.parent)
    with pytest.raises(UsageError, match="exists already"):
        write_artifact(artifact)
    assert snapshot(artifact.parent) == before


def test_force_replaces_and_interrupts_do_not(artifact: Path) -> None:
    (artifact / "added").write_text("x")
    before = snapshot(artifact.parent)

    def interrupted() -> None:
        with ArtifactWriter(artifact, force=True) as writer:
            writer.write_text("README.md", "x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert snapshot(artifact.parent) == before
    write_artifact(artifact, force=True)
    assert snapshot(artifact.parent).keys() == before.keys() - {"out/added"}
    Artifact.open(artifact)


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as first:
        first.write_text("README.md", "first")
        with pytest.raises(UsageError, match=rf"process {os.getpid()}\) is writing it"):
            write_artifact(tmp_path / "out", force=True)
        write_artifact(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions stop")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(UsageError, match="cannot be written"):
        write_artifact(tmp_path / "locked" / "out")
