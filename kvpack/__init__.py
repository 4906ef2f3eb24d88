"""Compress language models offline: weights and KV cache, one verified artifact.

>>> import kvpack
>>> model = kvpack.load("out/")  # a transformers model: packed weights, compressed KV cache
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpack.loading.registration import register_when_imported

if TYPE_CHECKING:
    from kvpack.loading.load import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

register_when_imported()


def __getattr__(name: str) -> Any:
    # Deferred: loading a model needs torch and transformers, most commands do not.
    if name == "load":
        from kvpack.loading.load import load

        return load
    raise AttributeError(f"module 'kvpack' has no attribute {name!r}")
