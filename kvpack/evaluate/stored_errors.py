"""How far keys and values as stored are from what the model gave to the cache, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerError:
    """Relative errors ||X - X^|| / ||X|| of one layer's keys and values, over all tokens and heads."""

    layer: int
    key: float
    value: float


class StoredErrors:
    """Sums of squares of what caches are given, and of the differences to what they hand back.

    Each layer is compared with its own input, which carries the errors of the layers before it:
    the figure is the layer's own loss. What a folded transform changes is compared in its basis.
    Only a cache that hands back what it stores (``exact_prefill=False``) has something to measure.
    """

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}

    def watch(self, cache: Any) -> None:
        """Observe every layer of a fresh cache."""
        for index, layer in enumerate(cache.layers):
            layer.update = self._observed(index, layer.update)

    def layers(self) -> tuple[LayerError, ...]:
        """The relative errors so far; layers that were never measured are absent."""
        return tuple(
            LayerError(layer, _ratio(sums[0], sums[1]), _ratio(sums[2], sums[3]))
            for layer, sums in sorted(self._sums.items())
        )

    def _observed(self, index: int, update: Callable[..., Any]) -> Callable[..., Any]:
        def observe(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            held = update(key, value, *args, **kwargs)
            if [x.shape for x in held] == [key.shape, value.shape]:
                sums = self._sums.setdefault(index, [0.0] * 4)
                for at, (exact, stored) in enumerate(zip((key, value), held, strict=True)):
                    sums[2 * at] += _square(exact.float() - stored.float())
                    sums[2 * at + 1] += _square(exact.float())
            return held

        return observe


def _square(x: Tensor) -> float:
    return float(x.square().sum().double())


def _ratio(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole else 0.0
