"""Roles that answer how a model's weights are compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from kvpack.core.errors import RecipeError
from kvpack.core.roles.codecs import Codec, GridCodec
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


def row_grids(codec: Codec, weight: Tensor, solver: str) -> GridCodec:
    """The grids of `codec` for the rows of `weight` [R, C], each row on its own.

    Raises:
        RecipeError: it has none, or groups run along the rows.
    """
    grids = codec.gridded(weight)
    if grids is None or grids.token_block != 1:
        raise RecipeError(
            f"{solver} cannot choose codes for {type(codec).__name__} as configured",
            hint="use a codec with groups along channels, such as affine, or solver: {kind: rtn}",
        )
    return grids
