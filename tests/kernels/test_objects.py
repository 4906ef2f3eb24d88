import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("numba")
from llvmlite import binding

from kvpack.kernels.cpu import emit, entries, objects

pytestmark = pytest.mark.skipif(not objects.SUPPORTED, reason="numba keeps machine code itself here")
ADDS_ONE = """
define void @kvpack_{name}(ptr %frame) {{
  %before = load i64, ptr %frame
  %after = add i64 %before, 1
  store i64 %after, ptr %frame
  ret void
}}
"""


def machine_code(name: str, text: str = ADDS_ONE) -> bytes:
    objects.machine()  # makes LLVM ready
    found: bytes = objects.machine().emit_object(binding.parse_assembly(text.format(name=name)))
    return found


def run(address: int) -> int:
    number = ctypes.c_int64(41)
    entries.Entry.at(address).ctypes(ctypes.addressof(number))
    return number.value


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(objects, "_folders", lambda: iter((tmp_path / "loops",)))
    return tmp_path / "loops"


def kept(folder: Path, name: str) -> Path:
    """The file of a loop that was stored."""
    objects.store(name, machine_code(name))
    (file,) = folder.iterdir()
    return file


def test_stored_code_runs(folder: Path) -> None:
    kept(folder, "stored")
    address = objects.load("stored")
    assert address is not None
    assert run(address) == 42


def test_nothing_is_loaded_where_nothing_was_stored(folder: Path) -> None:
    assert objects.load("never") is None


def test_any_changed_byte_is_noticed(folder: Path) -> None:
    file = kept(folder, "changed")
    data = file.read_bytes()
    for place in (0, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert objects.load("changed") is None
    for damaged in (b"", data[:40], data[:-1], data + b"x"):
        file.write_bytes(damaged)
        assert objects.load("changed") is None


def test_code_of_other_sources_or_machines_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(folder, "stale")
    monkeypatch.setattr(objects, "_made_for", lambda: bytes(32))
    assert objects.load("stale") is None


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_is_not_used(folder: Path, mode: int) -> None:
    kept(folder, "open").chmod(mode)
    assert objects.load("open") is None


def test_a_folder_that_others_may_write_is_not_used(folder: Path) -> None:
    kept(folder, "place")
    folder.chmod(0o777)
    assert objects.load("place") is None
    objects.store("more", machine_code("more"))
    assert not list(folder.glob("more.*"))


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    file = kept(folder, "linked")
    file.symlink_to(file.rename(tmp_path / "elsewhere"))
    assert objects.load("linked") is None


def test_storing_replaces_what_was_there(folder: Path) -> None:
    file = kept(folder, "again")
    file.write_bytes(b"damaged")
    assert kept(folder, "again") == file
    assert objects.load("again") is not None


def test_a_place_that_takes_nothing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(objects, "_folders", lambda: iter((tmp_path / "file" / "below",)))
    objects.store("nowhere", machine_code("nowhere"))
    assert objects.load("nowhere") is None


def test_names_that_code_wants_from_elsewhere_are_found() -> None:
    body = "call void @abroad(ptr %x) ret void"
    text = f"declare void @abroad(ptr)\ndefine void @kvpack_{{name}}(ptr %x) {{{{ {body} }}}}"
    assert "abroad" in emit.missing(machine_code("wanting", text))
    assert not emit.missing(machine_code("content"))


def test_code_that_is_not_as_numba_writes_it_is_left_alone() -> None:
    class Strange:
        native_name = "cfunc.loop"

        def __init__(self, text: str) -> None:
            self.inspect_llvm: Callable[[], str] = lambda: text

    wrapper = "define ptr @cfunc.loop(ptr %x) {\n  ret ptr null\n}\n"
    assert emit.object_code("strange", Strange("; nothing\n")) is None
    assert emit.object_code("strange", Strange(wrapper)) is None
    known = "define i32 @loop(ptr %a, ptr %b, ptr %c) {\n  ret i32 0\n}\n"
    assert emit.object_code("strange", Strange(known + wrapper)) is not None
    wanting = known.replace("  ret i32", "  call void @numba_abroad()\n  ret i32")
    assert emit.object_code("strange", Strange(f"declare void @numba_abroad()\n{wanting}{wrapper}")) is None
    assert emit.object_code("strange", Strange(known.replace("ret i32 0", "ret") + wrapper)) is None


def test_loops_that_are_kept_need_no_numba() -> None:
    entries.entry("affine_rows")  # compiles it where no process has
    code = (
        "import sys; from kvpack.kernels.cpu.entries import entry; "
        "entry('affine_rows'); sys.exit('numba' in sys.modules)"
    )
    if objects.load("affine_rows") is None:
        pytest.skip("no folder keeps machine code")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
