"""One sweep over the columns that prunes and rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.measured import gram_matrix, warn_not_definite
from kvpack.core.roles import Codec, GridCodec, MaskedCodec, Solver
from kvpack.core.types import Payload, Solution, Stat, Stats

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class JointSweep(Solver):
    """GPTQ in which each row also chooses, group by group, which of its weights to drop.

    What a weight costs is judged on the weights as corrected by then: w^2 / U_jj^2 with inv(G) = U^T U
    for the Gram matrix G of the layer's inputs ("factor", SparseGPT), or w^2 G_jj ("energy", Wanda).
    Dropped and rounded weights pass their errors on alike. Without `joint` the weights are pruned by a
    sweep of their own, and rounded by a second one that may not change the mask. Where the codec of
    what is kept has no grid, the sweep prunes, and that codec encodes what is left.

    `damp`, `block` and matrices that cannot be inverted are as of `gptq`. `clip_steps` strengths from 1
    down to `clip_least` are tried on the range of every grid, for both ends alike; only for codecs whose
    grid follows from its least and its greatest number.

    Sources: SparseGPT, arXiv 2301.00774; GPTQ, arXiv 2210.17323; AccLLM, arXiv 2505.03745, whose
    abstract does not say how it prunes: this is a reconstruction.
    """

    score: Literal["factor", "energy"] = "factor"
    joint: bool = True
    clip_steps: int = field(default=1, metadata={"minimum": 1, "maximum": 64})
    clip_least: float = field(default=0.5, metadata={"minimum": 0.05, "maximum": 1.0})
    damp: float = field(default=0.01, metadata={"minimum": 1e-6, "maximum": 1.0})
    block: int = field(default=128, metadata={"minimum": 1})

    def requires(self) -> frozenset[Stat]:
        """The Gram matrix of the layer's inputs."""
        return frozenset({Stat("gram")})

    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Solution:
        """Encode `weight` [R, C].

        Raises:
            RecipeError: the codec prunes nothing, or its groups run along the rows.
            KvpackError: the Gram matrix is missing, has another size, or is not finite.
        """
        if not isinstance(codec, MaskedCodec) or codec.token_block != 1:
            raise RecipeError(
                f"joint_sweep has nothing to prune for {type(codec).__name__} as configured",
                hint="use codec: {kind: nm_sparse, codec: ...} with groups along channels, or solver: gptq",
            )
        channels = weight.shape[1]
        gram = gram_matrix(stats, channels, "joint_sweep")
        upper = ops.gptq.inverse_factor(gram, self.damp)
        if upper is None:
            warn_not_definite("joint_sweep", "this weight is pruned by magnitude and rounded to nearest")
            return Solution(codec.encode(weight, {}))
        matrix = ops.masks.filled(weight.float(), codec.of)
        metric = gram.diagonal() if self.score == "energy" else upper.diagonal().square().reciprocal()
        payload = self._solve(
            matrix,
            ops.gptq_sparse.padded(upper, matrix.shape[1]),
            ops.masks.filled(metric, codec.of),
            codec,
            weight.dtype,
        )
        return Solution(Payload(payload.tensors, tuple(weight.shape)))

    def _solve(
        self, matrix: Tensor, upper: Tensor, metric: Tensor, codec: MaskedCodec, dtype: torch.dtype
    ) -> Payload:
        """The payload of weights, of this dtype once, whose last columns fill up a group."""

        def sweep(
            weight: Tensor, rounding: ops.gptq_sparse.Rounding | None, kept: Tensor | None = None
        ) -> ops.gptq_sparse.Swept:
            """Prune `weight` and round it, or round where a mask `kept` has pruned it."""
            pattern = (codec.keep, codec.of)
            return ops.gptq_sparse.sweep(
                weight, upper, metric, *pattern, rounding, kept=kept, block=self.block
            )

        first = ops.masks.largest(matrix.square() * metric, codec.keep, codec.of)
        grids = codec.survivors.gridded(ops.masks.closed(matrix, first))
        if grids is None:
            pruned = sweep(matrix, None)
            return codec.join(pruned.kept, codec.survivors.encode(pruned.weights.to(dtype), {}))
        rounding = self._rounding(grids, matrix.shape[1] // codec.of * codec.keep, codec.keep)
        kept = None
        if not self.joint:
            pruned = sweep(matrix, None)
            kept, matrix = pruned.kept, ops.masks.opened(pruned.weights, pruned.kept)
        found = sweep(matrix, rounding, kept)
        return codec.join(found.kept, grids.assemble(found.codes, found.grid))

    def _rounding(self, grids: GridCodec, survivors: int, keep: int) -> ops.gptq_sparse.Rounding:
        size = grids.group_size(survivors)
        if size < survivors and size % keep:
            raise RecipeError(
                f"joint_sweep cannot fit grids of {size} kept channels when {keep} of a group are kept",
                hint=f"use a group size that {keep} divides",
            )
        tried = ops.clip_search.pairs(self.clip_steps, self.clip_least, independent=False)

        def fit(columns: Tensor) -> dict[str, Tensor]:
            """A grid per row for the kept weights [R, G] of a group, with ranges cut where that is best."""
            return ops.clip_search.search(columns, columns.new_ones(columns.shape[1]), grids, tried)

        return ops.gptq_sparse.Rounding(size, fit, grids.snap, grids.value)
