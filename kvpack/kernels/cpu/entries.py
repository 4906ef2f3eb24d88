"""The compiled loops by name: loaded from their files, or compiled once."""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvpack.kernels.cpu import objects

_BUILDING = threading.RLock()
_HELD: dict[str, Entry] = {}


@dataclass(frozen=True)
class Entry:
    """A C function of one pointer; `keeps` is what must live as long as its code."""

    address: int
    ctypes: Callable[[int], None]
    keeps: Any = None

    @classmethod
    def at(cls, address: int, keeps: Any = None) -> Entry:
        """The function at an address."""
        return cls(address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), keeps)


def entry(name: str) -> Entry:
    """The loop of a module of this package, made at most once, by one thread while others wait."""
    if name not in _HELD:
        with _BUILDING:
            if name not in _HELD:
                _HELD[name] = _made(name)
    return _HELD[name]


def _made(name: str) -> Entry:
    address = objects.load(name)
    return _compiled(name) if address is None else Entry.at(address)


def _compiled(name: str) -> Entry:
    """Compile a loop, which takes seconds, and keep its machine code."""
    function = importlib.import_module(f"kvpack.kernels.cpu.{name}").compiled()
    if objects.SUPPORTED:
        from kvpack.kernels.cpu.emit import object_code

        code = object_code(name, function)
        if code is not None:
            objects.store(name, code)
            return Entry.at(objects.link(name, code))
    return Entry.at(function.address, function)
