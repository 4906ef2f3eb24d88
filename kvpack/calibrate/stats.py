"""Mergeable statistics: an accumulator per kind, found by its name.

`update` over parts of the data and `merge` over accumulators give the same result as one pass, so
the same code serves one process, a resumed run and many processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from kvpack.core.errors import KvpackError
from kvpack.core.types import State

if TYPE_CHECKING:
    from torch import Tensor


class Accumulator(ABC):
    """A statistic of tensors [B, K, T, D] (inputs of a linear layer: [B, 1, T, C])."""

    kind: ClassVar[str]

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in more tokens."""
        self.count += x.shape[0] * x.shape[2]
        self._add(self.measure(x))

    def merge(self, other: Accumulator) -> None:
        """Take in what another accumulator of the same kind has seen."""
        if other.kind != self.kind:
            raise ValueError(f"cannot merge {other.kind!r} into {self.kind!r}")
        self.count += other.count
        if other._total is not None:
            self._add(other._total)

    def state(self) -> State:
        """The finished statistic and the number of tokens, "count"."""
        if self._total is None:
            raise ValueError(f"{self.kind}: no data was seen")
        return {self.name: self._total, "count": torch.tensor(self.count)}

    def _add(self, part: Tensor) -> None:
        # A copy, so that nobody else's tensor is ever written to.
        self._total = part.clone() if self._total is None else self.combine(self._total, part)

    name: ClassVar[str]

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """The statistic of one tensor."""

    @abstractmethod
    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """Join two results; may write to `total`."""


class Gram(Accumulator):
    """Sum of x^T x over tokens, float32 [C, C]: what GPTQ calls half the Hessian."""

    kind, name = "gram", "gram"

    def measure(self, x: Tensor) -> Tensor:
        """x^T x."""
        flat = x.reshape(-1, x.shape[-1]).float()
        return flat.T @ flat

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """Add."""
        return total.add_(part)


class ChannelSum(Accumulator):
    """Sum of every channel over batch and tokens, float64 [K, D]."""

    kind, name = "channel_sum", "sum"

    def measure(self, x: Tensor) -> Tensor:
        """Sum over B and T."""
        return x.double().sum(dim=(0, 2))

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """Add."""
        return total.add_(part)


def accumulator(kind: str) -> Accumulator:
    """A new accumulator of a kind.

    Raises:
        KvpackError: no accumulator has that kind.
    """
    known = {c.kind: c for c in Accumulator.__subclasses__()}
    if kind not in known:
        raise KvpackError(
            f"no statistic is called {kind!r}", hint=f"kvpack.calibrate.stats has: {', '.join(sorted(known))}"
        )
    return known[kind]()
