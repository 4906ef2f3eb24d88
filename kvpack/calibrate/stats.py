"""Mergeable statistics: an accumulator per kind, found by its name.

`update` over parts of the data and `merge` over accumulators give the same result as one pass, so
the same code serves one process, a resumed run and many processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from kvpack import ops
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
    STEP: ClassVar[int] = 256

    def update(self, x: Tensor) -> None:
        """Add x^T x where the total is."""
        self.count += x.shape[0] * x.shape[2]
        self._total = self._added(x, self._total)

    def measure(self, x: Tensor) -> Tensor:
        """x^T x, of which only the upper triangle is right: half the work where there are many channels."""
        return self._added(x, None)

    def _added(self, x: Tensor, total: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()
        total = flat.new_zeros(flat.shape[1], flat.shape[1]) if total is None else total
        for start in range(0, flat.shape[1], self.STEP):
            part = slice(start, start + self.STEP)
            total[part, start:].addmm_(flat[:, part].T, flat[:, start:])
        return total

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """Add."""
        return total.add_(part)

    def state(self) -> State:
        """The whole matrix and the number of tokens."""
        found = super().state()
        upper = found[self.name].triu()
        return {**found, self.name: upper + upper.triu(1).mT}


class ChannelSum(Accumulator):
    """Sum of every channel over batch and tokens, float64 [K, D]."""

    kind, name = "channel_sum", "sum"

    def measure(self, x: Tensor) -> Tensor:
        """Sum over B and T."""
        return x.double().sum(dim=(0, 2))

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """Add."""
        return total.add_(part)


class ChannelSquare(Accumulator):
    """Sum of the squares of every channel over batch and tokens, float64 [K, D]."""

    kind, name = "channel_square", "squares"

    def measure(self, x: Tensor) -> Tensor:
        """Sum over B and T."""
        return x.double().square().sum(dim=(0, 2))

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """Add."""
        return total.add_(part)


class ChannelMagnitude(Accumulator):
    """Sum of the magnitudes of every channel over batch and tokens, float64 [K, D]."""

    kind, name = "channel_magnitude", "sum"

    def measure(self, x: Tensor) -> Tensor:
        """Sum over B and T."""
        return x.double().abs().sum(dim=(0, 2))

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """Add."""
        return total.add_(part)


class Magnitudes(Accumulator):
    """How often every channel has which magnitude: "counts" int64 [K*D, bins] of `ops.thresholds`."""

    kind, name = "magnitudes", "counts"

    def measure(self, x: Tensor) -> Tensor:
        """A histogram per channel."""
        return ops.thresholds.histogram(x.transpose(1, 2).flatten(2).flatten(0, 1))

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """Add."""
        return total.add_(part)


class Rows(Accumulator):
    """The tokens themselves, in order: "rows" float32 [K, N, D], N at most `LIMIT`.

    Every token is kept up to the limit; then every second one of those is dropped and only every
    second one is taken in, and so on, so that what is kept is evenly strided and depends on the
    number of tokens only: statistics of the same tokens (inputs, gradients) keep the same ones.
    "position" int32 [N] is each token's place in its sample. Merging keeps both accumulators' own
    choice where one of them had reached the limit.
    """

    kind, name = "rows", "rows"
    LIMIT: ClassVar[int] = 1 << 14

    def __init__(self) -> None:
        super().__init__()
        self._stride = 1
        self._position = torch.empty(0, dtype=torch.int32)

    def update(self, x: Tensor) -> None:
        """Take in the tokens of a batch, row after row."""
        batch, _, tokens, _ = x.shape
        chosen = torch.arange(batch * tokens)[-self.count % self._stride :: self._stride]
        self.count += batch * tokens
        self._add(self.measure(x)[:, chosen])
        self._position = torch.cat((self._position, (chosen % tokens).int()))
        self._thin()

    def merge(self, other: Accumulator) -> None:
        """Take in the tokens of another one."""
        super().merge(other)
        if isinstance(other, Rows) and other._total is not None:
            self._position = torch.cat((self._position, other._position))
            self._stride = max(self._stride, other._stride)
            self._thin()

    def state(self) -> State:
        """The rows, where they stood, and how many tokens were seen."""
        return {**super().state(), "position": self._position}

    def measure(self, x: Tensor) -> Tensor:
        """All rows."""
        return x.transpose(0, 1).flatten(1, 2).float()

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """One after the other."""
        return torch.cat((total, part), 1)

    def _thin(self) -> None:
        while len(self._position) > self.LIMIT and self._total is not None:
            self._total, self._position = self._total[:, ::2].clone(), self._position[::2].clone()
            self._stride *= 2


class AllRows(Accumulator):
    """Every token, in order: "rows" float32 [K, N, D]. For clusters, which need many of them."""

    kind, name = "all_rows", "rows"

    def measure(self, x: Tensor) -> Tensor:
        """All rows."""
        return x.transpose(0, 1).flatten(1, 2).float()

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """One after the other."""
        return torch.cat((total, part), 1)


class HeadGram(Accumulator):
    """Sum of x^T x over batch and tokens for every head, float32 [K, D, D]."""

    kind, name = "head_gram", "gram"

    def measure(self, x: Tensor) -> Tensor:
        """x^T x."""
        rows = x.transpose(0, 1).flatten(1, 2).float()
        return rows.mT @ rows

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """Add."""
        return total.add_(part)


class ChannelRange(Accumulator):
    """Least and greatest value of every channel over batch and tokens: "low", "high" float32 [K, D]."""

    kind, name = "channel_range", "range"

    def measure(self, x: Tensor) -> Tensor:
        """Least value, and least negated value, [2, K, D]."""
        x = x.float()
        return torch.stack((x.amin(dim=(0, 2)), (-x).amin(dim=(0, 2))))

    def combine(self, total: Tensor, part: Tensor) -> Tensor:
        """The lesser ones."""
        return torch.minimum(total, part)

    def state(self) -> State:
        """Both ends and the number of tokens."""
        found = super().state()
        low, negated_high = found.pop(self.name)
        return {"low": low, "high": -negated_high, **found}


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
