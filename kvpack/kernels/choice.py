"""Which kernels compute: decided once per process and device, visible in `kvpack doctor`.

``KVPACK_KERNELS`` forces a choice: "reference" switches every fast twin off, "numba" and "triton"
allow that one only; "auto", the default, allows all that this machine has.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from dataclasses import dataclass
from importlib import metadata, util
from typing import TYPE_CHECKING

from kvpack.core.errors import UsageError

if TYPE_CHECKING:
    import torch

VARIABLE = "KVPACK_KERNELS"
CHOICES = ("auto", "reference", "numba", "triton")


@dataclass(frozen=True)
class Found:
    """Kernels for one kind of device: whether they are in use, and why or why not."""

    device: str
    name: str
    used: bool
    why: str


def forced() -> str:
    """What the environment asks for.

    Raises:
        UsageError: a name that does not exist.
    """
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    if wanted not in CHOICES:
        raise UsageError(
            f"{VARIABLE}={wanted} is no set of kernels", hint=f"use one of {', '.join(CHOICES)}, or unset it"
        )
    return wanted


@functools.lru_cache(maxsize=8)
def _cpu(wanted: str) -> Found:
    if wanted not in ("auto", "numba"):
        return Found("cpu", "reference", False, f"{VARIABLE}={wanted}")
    try:
        return Found("cpu", "numba", True, f"numba {metadata.version('numba')}")
    except metadata.PackageNotFoundError:
        return Found("cpu", "reference", False, "numba is not installed")


@functools.cache
def _loads() -> bool:
    """Whether numba can be imported; says so where it cannot, and the reference takes over."""
    try:
        importlib.import_module("kvpack.kernels.cpu.pool")
    except (ImportError, OSError) as error:
        warnings.warn(f"kvpack's kernels cannot be used, decoding will be slow: {error}", stacklevel=2)
        return False
    return True


@functools.lru_cache(maxsize=8)
def _cuda(wanted: str) -> Found:
    if wanted not in ("auto", "triton"):
        return Found("cuda", "reference", False, f"{VARIABLE}={wanted}")
    from kvpack.kernels import triton

    if util.find_spec("triton") is None:
        return Found("cuda", "reference", False, "triton is not installed")
    version = metadata.version("triton")
    if triton.interpreting():
        return Found("cuda", "triton", True, f"triton {version}, interpreted on the CPU: very slow")
    if not triton.available():
        return Found("cuda", "reference", False, "no GPU of compute capability 8.0 or above")
    return Found("cuda", "triton", True, f"triton {version}")


def found(device: str) -> Found:
    """What computes on devices of a kind ("cpu", "cuda")."""
    if device == "cpu":
        return _cpu(forced())
    if device == "cuda":
        return _cuda(forced())
    return Found(device, "reference", False, "there are no kernels for this kind of device")


def on_cpu(*tensors: torch.Tensor | None) -> bool:
    """Whether the CPU's kernels compute with these tensors."""
    return all(t is None or t.device.type == "cpu" for t in tensors) and found("cpu").used and _loads()


def on_gpu(*tensors: torch.Tensor | None) -> bool:
    """Whether the GPU's kernels compute with these tensors.

    With ``KVPACK_KERNELS=triton`` and Triton's interpreter they do so with the CPU's, for tests.
    """
    kind = "cuda"
    if forced() == "triton":
        from kvpack.kernels import triton

        kind = "cpu" if triton.interpreting() else kind
    return all(t is None or t.device.type == kind for t in tensors) and found("cuda").used


def warm_up() -> None:
    """Compile what most models need, or load it from the cache: seconds that can pass beside others.

    Does nothing where the CPU's kernels are not used.
    """
    if found("cpu").used and _loads():
        from kvpack.kernels.cpu.entries import entry

        for name in ("affine_rows", "integer_rows", "affine_encode_rows"):
            entry(name)
