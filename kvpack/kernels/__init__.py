"""Fast twins of the reference mathematics in `kvpack.ops`, chosen at run time.

A function here has the name, the arguments and the results of its reference, and leaves the work to
it wherever nothing faster fits. Submodules are imported on first use: reading a part's settings
imports neither torch nor a compiler.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpack.kernels import affine as affine
    from kvpack.kernels import affine_encode as affine_encode
    from kvpack.kernels import choice as choice
    from kvpack.kernels import lookup as lookup
    from kvpack.kernels import rows as rows


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
