"""Make `AutoModelForCausalLM.from_pretrained(artifact)` work once kvpack is imported.

Transformers knows quantisation methods from a registry that must be filled after it is imported.
Importing it from `kvpack/__init__.py` would cost every `kvpack --help` some seconds, so a finder
on `sys.meta_path` waits for transformers' registry module instead. Nothing of transformers is
replaced: its own public registration functions are called, once.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _RegisterAfter(Loader):
    """Loads the registry module as its own loader would, then registers kvpack."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def _register() -> None:
    from kvpack.loading.quantizer import register

    register()


def register_when_imported() -> None:
    """Register kvpack's quantizer now if transformers is there, otherwise when it arrives."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
