"""Checkpoints and architectures: the only layer that knows a model family's module names.

Start with `open_model`, which turns a folder or hub id into a `ModelSpec`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpack.models.describe import open_model as open_model

__all__ = ["open_model"]


def __getattr__(name: str) -> Any:
    """Import on first use: describing a model needs transformers, resolving a path does not."""
    if name in __all__:
        from kvpack.models import describe

        return getattr(describe, name)
    raise AttributeError(name)
