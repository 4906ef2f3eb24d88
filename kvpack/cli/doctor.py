"""`kvpack doctor`: can this machine do the job?"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from kvpack import __version__
from kvpack.cli.console import table
from kvpack.cli.run import Result, Session
from kvpack.core.errors import CheckFailed, UsageError
from kvpack.report import human_bytes

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_int8", "neon")
_MIN_FREE_BYTES = 1_000_000_000
_MIN_OPEN_FILES = 256
_SLOW_FSYNC_SECONDS = 0.5


@dataclass(frozen=True)
class Check:
    """One question to the machine: ok, warning or failed."""

    name: str
    status: str
    found: str
    hint: str = ""


def doctor(
    session: Session,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where artifacts would be written.")
    ] = Path(),
) -> Result:
    """Check versions, processor, disk and environment."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    machine = [_cpu(), *_kernels(), _disk(folder), *_writing(folder), _open_files()]
    checks = [*_versions(), *machine, _hub(), _recipes()]
    failed = [check for check in checks if check.status == "failed"]
    for check in checks:
        if check.status == "warning":
            session.warn(f"{check.name}: {check.hint}")
    rows = [(c.status, c.name, c.found) for c in checks]
    failure = None
    if failed:
        what = f"{len(failed)} of {len(checks)} checks failed: {', '.join(c.name for c in failed)}"
        failure = CheckFailed(what, hint="\n".join(c.hint for c in failed))
    return Result({"checks": checks}, (table(("status", "check", "found"), rows),), failure)


def _versions() -> Iterator[Check]:
    """Every runtime requirement, against the range that the package states."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    try:
        requirements = metadata.requires("kvpack") or []
    except metadata.PackageNotFoundError:
        hint = "install kvpack with pip; it runs from a bare folder"
        yield Check("kvpack", "warning", __version__, hint)
        return
    yield Check("kvpack", "ok", __version__)
    for requirement in requirements:
        text, _, marker = requirement.partition(";")
        if "extra ==" not in marker:
            yield _package(text.strip())


def _package(requirement: str) -> Check:
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Check(wanted.name, "failed", "missing", f"pip install '{requirement}'")
    if wanted.specifier.contains(version, prereleases=True):
        return Check(wanted.name, "ok", version)
    return Check(
        wanted.name, "failed", f"{version}, needs {wanted.specifier}", f"pip install '{requirement}'"
    )


def _cpu() -> Check:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    flags = " ".join(flag for flag in _CPU_FLAGS if flag in words) or "no known vector extensions listed"
    return Check("cpu", "ok", f"{os.cpu_count()} cores, {platform.machine()}, {flags}")


def _kernels() -> Iterator[Check]:
    """What computes on compressed numbers, for every kind of device that is here."""
    from kvpack.kernels import choice

    try:
        asked = choice.forced()
    except UsageError as error:
        yield Check("kernels", "failed", str(error), error.hint or "")
        return
    for device in ("cpu", "cuda"):
        if device == "cuda" and not _has_cuda():
            continue
        found = choice.found(device)
        hint = "" if found.used or asked == "reference" else f"decoding will be slow: {found.why}"
        text = f"{found.name} ({found.why}); {choice.VARIABLE}={asked}"
        yield Check(f"kernels, {device}", "warning" if hint else "ok", text, hint)


def _has_cuda() -> bool:
    """Whether a driver of NVIDIA is installed: asking torch would take seconds."""
    return shutil.which("nvidia-smi") is not None


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    if free < _MIN_FREE_BYTES:
        return Check("disk", "warning", f"{human_bytes(free)} free", f"little space is left at {folder}")
    return Check("disk", "ok", f"{human_bytes(free)} free")


def _writing(folder: Path) -> Iterator[Check]:
    """An export writes beside its target, syncs, and appears by one rename: try all three."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".kvpack-doctor-") as scratch:
            file = Path(scratch, "file")
            with file.open("wb") as stream:
                stream.write(b"\0" * 4096)
                stream.flush()
                start = time.perf_counter()
                os.fsync(stream.fileno())
                seconds = time.perf_counter() - start
            Path(scratch, "a").mkdir()
            Path(scratch, "a").rename(Path(scratch, "b"))
    except OSError as error:
        hint = f"{folder} must be writable and able to rename folders"
        yield Check("write and rename", "failed", str(error.strerror), hint)
        return
    yield Check("write and rename", "ok", str(folder.resolve()))
    slow = seconds > _SLOW_FSYNC_SECONDS
    hint = "exports to this folder will be slow" if slow else ""
    yield Check("fsync", "warning" if slow else "ok", f"{seconds * 1000:.1f} ms", hint)


def _open_files() -> Check:
    try:
        import resource
    except ImportError:
        return Check("open files", "ok", "no limit known")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < _MIN_OPEN_FILES:
        return Check("open files", "warning", str(limit), "raise it with `ulimit -n 1024`")
    return Check("open files", "ok", str(limit))


def _hub() -> Check:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_ENDPOINT")
    found = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return Check("hub settings", "ok", found or "defaults; kvpack downloads only with --allow-download")


def _recipes() -> Check:
    from kvpack.recipe.locate import bundled

    return Check("bundled recipes", "ok", str(sum("/" not in name for name in bundled())))
