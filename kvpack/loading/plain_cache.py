"""Caches of transformers itself, to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from kvpack.core.errors import UnsupportedModel


def plain_cache(model: Any, backend: str | None = None) -> Any:
    """An empty cache as `generate()` makes it: `DynamicCache`, or `QuantizedCache` with a `backend`.

    Raises:
        UnsupportedModel: this version of transformers lacks the backend, or it cannot serve this model.
    """
    from transformers import cache_utils

    if backend is None:
        return cache_utils.DynamicCache(config=model.config)
    try:
        return cache_utils.QuantizedCache(backend, model.config)
    except (AttributeError, TypeError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(
            f"transformers' QuantizedCache with {backend} cannot be used",
            why=reason,
            hint="it needs transformers 5.23 or newer, and full attention in every layer",
        ) from error


def tensor_nbytes(cache: Any) -> tuple[int, int]:
    """Bytes of all tensors that a cache's layers hold, and of the memory that was allocated for them."""
    found = [tensor for layer in cache.layers for tensor in _tensors(vars(layer).values())]
    views = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in found}
    whole = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(views.values()), sum(whole.values())


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.numel():
                yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
