"""Import torch on first use.

`kvpack --help`, `kvpack recipes` and `kvpack inspect` read the part classes (their names and
settings) but run no mathematics. Importing torch costs seconds, so parts take it from here.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """A module that is imported when one of its attributes is first read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = LazyModule("torch")
