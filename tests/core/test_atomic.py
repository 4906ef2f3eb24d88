import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpack.core.atomic import check_free, new_folder, require_space
from kvpack.core.errors import ResourceError, UsageError


def make(target: Path, text: str = "new", force: bool = False) -> None:
    with new_folder(target, force=force) as scratch:
        (scratch / "kvpack.json").write_text(text)
        (scratch / "sub").mkdir()
        (scratch / "sub" / "x").write_text(text)


def fail(target: Path, error: BaseException, force: bool = False) -> None:
    with new_folder(target, force=force) as scratch:
        (scratch / "x").write_text("x")
        raise error


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_the_folder_appears_with_its_parents_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "a" / "b" / "out")
    assert names(tmp_path) == {"a", "a/b", *(f"a/b/out{n}" for n in ("", "/kvpack.json", "/sub", "/sub/x"))}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_the_disk_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail(tmp_path / "a" / "out", error())
    assert names(tmp_path) == set()


def test_an_existing_folder_is_refused_and_unchanged(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    before = names(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        make(tmp_path / "out")
    assert names(tmp_path) == before
    assert (tmp_path / "out" / "kvpack.json").read_text() == "old"


def test_force_replaces_what_kvpack_made(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    (tmp_path / "out" / "added").write_text("x")
    make(tmp_path / "out", "new", force=True)
    assert names(tmp_path) == {"out", "out/kvpack.json", "out/sub", "out/sub/x"}
    assert (tmp_path / "out" / "kvpack.json").read_text() == "new"


def test_force_fails_late_and_the_old_one_stays(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    before = names(tmp_path)
    with pytest.raises(ValueError, match="late"):
        fail(tmp_path / "out", ValueError("late"), force=True)
    assert names(tmp_path) == before


def test_force_never_replaces_anything_else(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in (("home", "was not made by kvpack"), ("file", "is a file")):
        with pytest.raises(UsageError, match=message):
            make(tmp_path / name, force=True)
    assert names(tmp_path) == {"home", "home/thesis.tex", "file"}


def test_force_takes_an_empty_folder_and_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", force=True)
    make(tmp_path / "other", force=True)
    assert (tmp_path / "empty" / "sub" / "x").exists()
    assert (tmp_path / "other" / "sub" / "x").exists()


def test_a_link_keeps_pointing(tmp_path: Path) -> None:
    make(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "kvpack.json").read_text() == "new"


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "sub").mkdir(parents=True)
    (tmp_path / ".out.partial" / "sub" / "x").write_text("half")
    (tmp_path / ".out.lock").write_text("999999")
    make(tmp_path / "out")
    assert names(tmp_path) == {"out", "out/kvpack.json", "out/sub", "out/sub/x"}


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(UsageError, match="exists already"):
        make(tmp_path / "out", "new")
    assert (tmp_path / "out" / "kvpack.json").read_text() == "old"
    assert names(tmp_path) == {"out", "out/kvpack.json", "out/sub", "out/sub/x"}


def test_a_kill_before_the_old_one_was_removed(tmp_path: Path) -> None:
    make(tmp_path / "out", "new")
    make(tmp_path / "old", "old")
    (tmp_path / "old").rename(tmp_path / ".out.replaced")
    make(tmp_path / "out", "newer", force=True)
    assert (tmp_path / "out" / "kvpack.json").read_text() == "newer"
    assert not (tmp_path / ".out.replaced").exists()


HOLD = """
import sys
from pathlib import Path
from kvpack.core.atomic import new_folder
with new_folder(Path(sys.argv[1])) as scratch:
    (scratch / "kvpack.json").write_text("first")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match=rf"another kvpack \(process {first.pid}\) is writing it"):
            make(tmp_path / "out", "second")
        first.stdin.write("\n")
        first.stdin.close()
        assert first.wait(30) == 0
    assert names(tmp_path) == {"out", "out/kvpack.json"}
    assert (tmp_path / "out" / "kvpack.json").read_text() == "first"


def test_space_is_checked_with_numbers(tmp_path: Path) -> None:
    require_space(tmp_path / "deep" / "out", 1)
    with pytest.raises(ResourceError, match=r"needs 1,000,000,000,000,000,000 bytes, [0-9,]+ are free"):
        require_space(tmp_path / "deep" / "out", 10**18)


def test_check_free_accepts_what_is_not_there(tmp_path: Path) -> None:
    check_free(tmp_path / "out")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    with pytest.raises(UsageError, match="exists already"):
        check_free(tmp_path / "dangling")


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be written"):
        make(tmp_path / "file" / "out")
    assert names(tmp_path) == {"file"}
