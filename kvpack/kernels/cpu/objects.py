"""Machine code of compiled loops, kept in files: the next process loads it without importing numba.

Importing numba and making its compiler ready takes most of a second, several times what the rest of
loading a small model takes. The linker behind numba (llvmlite) alone is there in a twentieth of that.

A file is used if all of this holds, else the loop is compiled again and the file replaced:

- it belongs to the user who runs this, to root, or to the owner of this package, and nobody else may
  write it; so does its folder. It is no link. Whoever could write it could change this package, too.
- its first line is that of this format, and the SHA-256 in it is that of everything behind it;
- it was made from these very sources, by these versions of numba and llvmlite, for this processor.

Windows and macOS are left to numba's own cache.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from kvpack.core.cache_dir import cache_dir

SUPPORTED = sys.platform == "linux"
"""Whether machine code is kept here. Elsewhere numba keeps its own."""
MOST_BYTES = 1 << 24
_FORMAT = b"kvpack-loop 1"
_FOLDER = Path(__file__).parent


@functools.cache
def stamp() -> int:
    """A number, not 0, that changes with any file of this package."""
    digest = hashlib.sha256()
    for file in sorted(_FOLDER.glob("*.py")):
        digest.update(file.read_bytes())
    return 1 + int.from_bytes(digest.digest()[:6], "little")


def symbol(name: str) -> str:
    """Name of a loop's C function in its machine code."""
    return f"kvpack_{name}"


def load(name: str) -> int | None:
    """Address of the C function of a loop, None where no file can be used."""
    if not SUPPORTED:
        return None
    for folder in _folders():
        code = _read(folder / _file_name(name))
        if code is not None:
            return link(name, code)
    return None


def link(name: str, code: bytes) -> int:
    """Bring machine code into this process; the address of its C function, which then stays."""
    from llvmlite import binding

    engine = _engine()
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address: int = engine.get_function_address(symbol(name))
    return address


def store(name: str, code: bytes) -> None:
    """Keep machine code for the next process, in the first folder that takes it; none may."""
    for folder in _folders():
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _trusted(os.stat(folder)):
                _write(folder / _file_name(name), code)
                return


def machine() -> Any:
    """What code is emitted for: this very processor."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    cpu, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


@functools.cache
def _engine() -> Any:
    from llvmlite import binding

    made = machine()
    return binding.create_mcjit_compiler(binding.parse_assembly(""), made)


@functools.cache
def _made_for() -> bytes:
    """Of what a file depends on: sources, compilers, processor."""
    from llvmlite import binding

    versions = [metadata.version(package) for package in ("numba", "llvmlite")]
    processor = (binding.get_default_triple(), binding.get_host_cpu_name())
    features = binding.get_host_cpu_features().flatten()
    return hashlib.sha256(repr((stamp(), versions, processor, features)).encode()).digest()


def _folders() -> Iterator[Path]:
    """Beside the compiled Python files of this package, and below the user's caches."""
    yield _FOLDER / "__pycache__"
    yield cache_dir() / "kernels"


def _file_name(name: str) -> str:
    """Of a loop on a kind of machine: a home on a network may serve several."""
    from llvmlite import binding

    features = f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()}"
    return f"{name}.{hashlib.sha256(features.encode()).hexdigest()[:12]}.loop"


def _head(body: bytes) -> bytes:
    return b"%s %s\n" % (_FORMAT, hashlib.sha256(body).hexdigest().encode())


def _write(path: Path, code: bytes) -> None:
    """Write beside, then rename; readable by all, writable by its owner."""
    body = _made_for() + code
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as stream:
            stream.write(_head(body) + body)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def _read(path: Path) -> bytes | None:
    """The machine code in a file; None unless it is as it was written, for this machine, by a friend."""
    try:
        if not _trusted(os.stat(path.parent)):
            return None
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as stream:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or not _trusted(found) or found.st_size > MOST_BYTES:
                return None
            head, body = stream.readline(128), stream.read(MOST_BYTES)
    except OSError:
        return None
    made_for = _made_for()
    return body[len(made_for) :] if head == _head(body) and body.startswith(made_for) else None


def _trusted(found: os.stat_result) -> bool:
    """Whether only those may write it who could change this package."""
    friends = {0, os.geteuid(), os.stat(__file__).st_uid}
    return found.st_uid in friends and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
