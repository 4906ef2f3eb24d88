"""Roles that answer how a model's weights are compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from kvpack.core.roles.compression import Codec
from kvpack.core.roles.part import Part
from kvpack.core.types import Payload, Stats

if TYPE_CHECKING:
    from torch import Tensor


class Solver(Part, ABC):
    """How the codes of a weight are chosen."""

    @abstractmethod
    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Payload:
        """Encode `weight` [R, C] with `codec`, knowing statistics of the layer's input."""
