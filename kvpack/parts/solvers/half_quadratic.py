"""Half-quadratic quantisation: zeros that suit most weights of a group, from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.lazy import torch
from kvpack.core.pieces import row_pieces
from kvpack.core.roles import Codec, GridCodec, Solver
from kvpack.core.types import Payload, Solution, State, Stats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HalfQuadratic(Solver):
    """Minimises the l_p norm of the weights' errors, p < 1, over the zeros of the codec's grid.

    Large weights then shape a grid less than with its range alone. Needs no data; the steps stay
    those of the codec. Formulas: `kvpack.ops.half_quadratic`.

    With the paper's constants a residual is only taken for an outlier beyond 0.17, in units of the
    weights. No weight of a usual model errs by that much, so that each zero becomes the mean of what
    it has to explain. `relative` measures residuals in steps, where 0.17 is a third of the largest.

    Source: HQQ (Mobius Labs, 2023), the path that grows beta. Deviations: each group stops on its
    own and keeps its best zero, so that the mean |error| of no group exceeds that of rounding, and
    the answer does not depend on how a weight is cut into pieces.
    """

    p: float = field(default=0.7, metadata={"minimum": 0.05, "maximum": 1.0})
    beta: float = field(default=10.0, metadata={"minimum": 1e-3})
    growth: float = field(default=1.01, metadata={"minimum": 1.0, "maximum": 10.0})
    relative: bool = False
    rounds: int = field(default=20, metadata={"minimum": 1, "maximum": 1000})

    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Solution:
        """Encode `weight` [R, C], some rows at a time.

        Raises:
            RecipeError: the codec's grid has no float zero per group of channels.
        """
        if not isinstance(codec, GridCodec) or codec.token_block != 1:
            raise _no_zero(codec)
        pieces = [
            self._piece(weight[start:stop].float(), codec).tensors
            for start, stop in row_pieces(weight.shape[0], weight.shape[1])
        ]
        tensors = {name: torch.cat([piece[name] for piece in pieces], -2) for name in pieces[0]}
        return Solution(Payload(tensors, tuple(weight.shape)))

    def _piece(self, weight: Tensor, codec: GridCodec) -> Payload:
        grid: State = codec.grid(weight)
        if "zero" not in grid or not grid["zero"].dtype.is_floating_point:
            raise _no_zero(codec)
        codes, grid = ops.half_quadratic.centre(
            weight,
            grid,
            codec.group_size(weight.shape[1]),
            codec.snap,
            codec.value,
            p=self.p,
            beta=self.beta,
            growth=self.growth,
            rounds=self.rounds,
            relative=self.relative,
        )
        return codec.assemble(codes, grid)


def _no_zero(codec: Codec) -> RecipeError:
    return RecipeError(
        f"half_quadratic has nothing to choose for {type(codec).__name__} as configured",
        why="it moves the float zero of grids along channels",
        hint="use {kind: affine, zero: float} with groups along channels",
    )
