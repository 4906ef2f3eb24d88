"""Roles that answer how a model's weights are compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from kvpack.core.roles.codecs import Codec
from kvpack.core.roles.part import Part
from kvpack.core.types import Solution, Stats

if TYPE_CHECKING:
    from torch import Tensor


class Solver(Part, ABC):
    """How the codes of a weight are chosen."""

    teaches: ClassVar[bool] = False
    """Whether it gives codecs that learn (`Codec.requires`, `Codec.state_spec`) their state."""

    def stacks(self, codec: Codec) -> bool:
        """Whether no row's codes depend on other rows: what shares an input may be solved as one matrix."""
        return False

    @abstractmethod
    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Solution:
        """Encode `weight` [R, C] with `codec`, knowing statistics of the layer's input."""
