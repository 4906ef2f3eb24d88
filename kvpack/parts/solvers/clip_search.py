"""Round to nearest on grids whose ranges are cut where that loses least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.measured import gram_matrix
from kvpack.core.roles import Codec, Solver, row_grids
from kvpack.core.types import Solution, Stat, Stats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClipSearch(Solver):
    """Tries `steps` strengths from 1 down to `least` on the range of every group of every row.

    `ends` "together" cuts both ends by the same strength, "alone" tries all pairs. `metric` "gram"
    measures what the group adds to the layer's output on the calibration inputs, d G d^T with the
    Gram matrix G of the group's inputs, as AWQ does; "energy" takes only the diagonal of G, which is
    faster where many pairs are tried. Source: AWQ, arXiv 2306.00978, section 3 and its official code
    (10 strengths down to 0.55, on 512 sampled tokens instead of all).
    """

    steps: int = field(default=11, metadata={"minimum": 1, "maximum": 64})
    least: float = field(default=0.5, metadata={"minimum": 0.05, "maximum": 1.0})
    ends: Literal["together", "alone"] = "together"
    metric: Literal["gram", "energy"] = "gram"

    def requires(self) -> frozenset[Stat]:
        """The Gram matrix of the layer's inputs."""
        return frozenset({Stat("gram")})

    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Solution:
        """Encode `weight` [R, C].

        Raises:
            RecipeError: the codec has no grid, or its groups run along the rows.
            KvpackError: the Gram matrix is missing, has another size, or is not finite.
        """
        grids = row_grids(codec, weight, "clip_search")
        gram = gram_matrix(stats, weight.shape[1], "clip_search")
        tried = ops.clip_search.pairs(self.steps, self.least, independent=self.ends == "alone")
        metric = gram if self.metric == "gram" else gram.diagonal()
        matrix = weight.float()
        grid = ops.clip_search.fit(matrix, metric, grids, tried)
        return Solution(grids.assemble(grids.snap(matrix, grid), grid))
