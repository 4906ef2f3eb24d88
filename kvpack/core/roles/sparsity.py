"""The role that answers which numbers of a token are small enough to be left out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kvpack.core.roles.part import Part
from kvpack.core.types import Shape, Stat, State, Stats, TensorSpec

NEVER = 3.0e38
"""A threshold that nothing reaches: for channels that never mattered. Finite in bfloat16."""


class Thresholds(Part, ABC):
    """From what magnitude on a number of a token is kept; what is below becomes zero.

    Rows and columns of weights that meet only zeros are not read. `keep_fraction` is the share of
    numbers that is kept, over all tokens and channels of one layer.

    `fit` is given "magnitudes" of the tensor, "consumers.weight" (the matrix [R, C] that reads it)
    and, where every channel is multiplied with a number that is not known yet, the mean magnitude of
    those numbers, "factor.channel_magnitude". It returns "threshold", bfloat16 [C] or [1], finite and
    not negative.
    """

    keep_fraction: float

    def requires(self) -> frozenset[Stat]:
        """A histogram of magnitudes."""
        return frozenset({Stat("magnitudes")})

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """The threshold."""
        return {"threshold": TensorSpec((self.width(shape[-1]),), "bfloat16")}

    @abstractmethod
    def width(self, channels: int) -> int:
        """Numbers of the threshold for `channels` channels: that many, or one for all."""

    @abstractmethod
    def fit(self, stats: Stats) -> State:
        """The threshold of one layer."""
