"""The role that answers where a budget of bits is spent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from kvpack.core.roles.part import Part
from kvpack.core.types import Stats

if TYPE_CHECKING:
    from torch import Tensor


class Allocator(Part, ABC):
    """How much is lost when a linear layer is approximated?

    Losses of all layers of a model, or of a block, are added up, and the sum is made as small as a
    budget of bytes allows: only their proportions matter. Statistics are those of the layer's input
    in the uncompressed model (`Stat.of` "input") and of the gradient of the loss of all tokens of a
    sample with respect to its output ("output_gradient").
    """

    @abstractmethod
    def loss(self, weight: Tensor, approximation: Tensor, stats: Stats) -> float:
        """What it costs that `approximation` stands for `weight`, both float32 [R, C]; 0 or more.

        Raises:
            KvpackError: a statistic is missing.
        """
