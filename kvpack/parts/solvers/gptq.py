"""GPTQ: second-order rounding of weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import kernels, ops
from kvpack.core.measured import gram_matrix, warn_not_definite
from kvpack.core.roles import Codec, GridCodec, Solver, row_grids
from kvpack.core.types import Solution, Stat, Stats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gptq(Solver):
    """Chooses codes that keep the layer's outputs, not its weights, close on calibration inputs.

    `damp` is relative to the mean diagonal of the Gram matrix and grows tenfold until the matrix
    can be inverted; if nothing helps, the weights are rounded to nearest, with a warning.
    `act_order` sweeps columns from the most to the least active, with grids fitted beforehand, so
    that the payload needs no extra index. `block` columns share one delayed update.

    Source: GPTQ, arXiv 2210.17323. Deviation: weights of channels that calibration never activated
    are rounded to nearest instead of set to zero, because other text may activate them.
    """

    damp: float = field(default=0.01, metadata={"minimum": 1e-6, "maximum": 1.0})
    act_order: bool = False
    block: int = field(default=128, metadata={"minimum": 1})

    def requires(self) -> frozenset[Stat]:
        """The Gram matrix of the layer's inputs."""
        return frozenset({Stat("gram")})

    def stacks(self, codec: Codec) -> bool:
        """One factor and one sweep for all rows, wherever grids are fitted to rows alone."""
        return isinstance(codec, GridCodec) and codec.token_block == 1

    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Solution:
        """Encode `weight` [R, C].

        Raises:
            RecipeError: the codec has no grid, or its groups run along the rows.
            KvpackError: the Gram matrix is missing, has another size, or is not finite.
        """
        grids = row_grids(codec, weight, "gptq")
        gram = gram_matrix(stats, weight.shape[1], "gptq")
        order = gram.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        upper = ops.gptq.inverse_factor(gram if order is None else gram[order][:, order], self.damp)
        if upper is None:
            warn_not_definite("gptq", "this weight is rounded to nearest")
            return Solution(codec.encode(weight, {}))
        codes, grid = kernels.gptq.solve(
            weight.float(),
            upper,
            grids.group_size(weight.shape[1]),
            grids.grid,
            grids.snap,
            grids.value,
            order=order,
            block=self.block,
            even=grids.even,
        )
        return Solution(grids.assemble(codes, grid))
