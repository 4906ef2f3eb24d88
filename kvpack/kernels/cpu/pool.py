"""Running compiled loops on torch's own pool of threads.

A second pool would fight with torch's for the cores: its threads spin while they wait. Torch's
wheels for Linux bring GNU's OpenMP runtime, whose entry point `GOMP_parallel` takes any C function;
elsewhere Python threads do, which cost some tens of microseconds a call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
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
    held = np.empty(count * room + 64, np.uint8)
    start = -(-held.ctypes.data // 64) * 64
    frame = np.array((0, items, 0, start, room, *arguments), np.int64)
    address = frame.ctypes.data
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
