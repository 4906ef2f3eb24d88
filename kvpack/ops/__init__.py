"""Pure torch functions: the reference mathematics that parts are made of.

Submodules are imported on first use, so that reading a part's settings does not import torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpack.ops import affine as affine
    from kvpack.ops import bits as bits
    from kvpack.ops import gptq as gptq
    from kvpack.ops import hadamard as hadamard
    from kvpack.ops import window as window


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
