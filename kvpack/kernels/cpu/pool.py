"""Running compiled loops on torch's own pool of threads.

A second pool would fight with torch's for the cores: its threads spin while they wait. Torch's
wheels for Linux bring GNU's OpenMP runtime, whose entry point `GOMP_parallel` takes any C function;
elsewhere Python threads do, which cost some tens of microseconds a call.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

Entry = Any
"""A compiled C function of one pointer: `kvpack.kernels.cpu.jit.entry`."""


@functools.lru_cache(maxsize=1)
def _parallel() -> Callable[..., None] | None:
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.lru_cache(maxsize=1)
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kvpack-kernels")


def threads() -> int:
    """How many threads a kernel may use: torch's setting."""
    return torch.get_num_threads()


def run(entry: Entry, items: int, scratch: int, *arguments: int) -> None:
    """Let threads take the items 0 to `items` - 1, one after another, until none is left.

    Args:
        entry: what computes. It reads a frame of int64: ``[counter, items, threads that have begun,
            address of scratch, bytes of scratch of a thread, *arguments]``.
        items: pieces of independent work.
        scratch: bytes that a thread needs for itself.
        arguments: addresses and sizes.
    """
    count = min(threads(), items)
    room = -(-scratch // 64) * 64
    held = torch.empty(count * room + 64, dtype=torch.uint8)
    frame = array("q", (0, items, 0, -(-held.data_ptr() // 64) * 64, room, *arguments))
    address = frame.buffer_info()[0]
    parallel = _parallel()
    if count <= 1:
        entry.ctypes(address)
    elif parallel is not None:
        parallel(entry.address, address, count, 0)
    else:
        others = [_executor().submit(entry.ctypes, address) for _ in range(count - 1)]
        entry.ctypes(address)
        for other in others:
            other.result()
