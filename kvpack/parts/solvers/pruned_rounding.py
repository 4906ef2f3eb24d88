"""Round to nearest with as wide a step and as many zeros as an error bound allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.roles import Codec, GridCodec, Solver
from kvpack.core.types import Solution, Stat, Stats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PrunedRounding(Solver):
    """Codes that a lossless coder compresses well, at a bounded error of the layer's outputs.

    First the step grows by the largest of `widths` whose squared output error, relative to the
    outputs, is at most `error`; then the largest of `pruned` shares of every row is zeroed that keeps
    it below twice that, the weights with the least |w_ij| max|x_j| first; in the end every row is
    scaled to fit its outputs best. `step`: one step for the whole weight, or one per row.

    Source: double compression, arXiv 2502.15443; its formulas are not public, this is a
    reconstruction. The score is Wanda's, arXiv 2306.11695, with the largest instead of the root mean
    square activation.
    """

    error: float = field(default=1e-3, metadata={"minimum": 0.0})
    widths: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    pruned: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    step: Literal["tensor", "row"] = "tensor"

    def requires(self) -> frozenset[Stat]:
        """The Gram matrix and the ranges of the layer's inputs."""
        return frozenset({Stat("gram"), Stat("channel_range")})

    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Solution:
        """Encode `weight` [R, C].

        Raises:
            RecipeError: the codec's grids are not symmetric.
            KvpackError: a statistic is missing.
        """
        if not isinstance(codec, GridCodec) or getattr(codec, "zero", "") != "none" or codec.token_block > 1:
            raise RecipeError(
                f"pruned_rounding cannot choose codes for {type(codec).__name__} as configured",
                hint="for example codec: {kind: affine, bits: 8, group: {size: 0}, zero: none}",
            )
        if "gram" not in stats or "channel_range" not in stats:
            raise KvpackError("the layer's inputs were not measured", hint="calibrate first")
        weight, gram = weight.float(), stats["gram"]["gram"]
        found = stats["channel_range"]
        peak = ops.channel_factors.magnitude(found["low"], found["high"]).flatten()
        allowed = self.error * ops.channel_factors.output_energy(weight[None], gram[None])
        codes, grid = self._widest(weight, codec, gram, allowed)
        order = (weight.abs() * peak).argsort(-1)
        codes = self._sparsest(weight, codec, grid, gram, codes, order, 2 * allowed)
        grid["scale"] = ops.layer_outputs.refit(weight, codec.value(codes, grid), gram, grid["scale"])
        return Solution(codec.assemble(codes, grid))

    def _widest(
        self, weight: Tensor, codec: GridCodec, gram: Tensor, allowed: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes on the grid with the widest step that is allowed; the first of `widths` always is."""
        first = codec.grid(weight)
        chosen: tuple[Tensor, dict[str, Tensor]] | None = None
        for width in sorted(self.widths):
            scale = first["scale"]
            if self.step == "tensor":
                scale = ops.entropy.one_step(scale, width)
            else:
                scale = (scale.float() * width).to(scale.dtype)
            grid = {**first, "scale": scale}
            codes = codec.snap(weight, grid)
            if chosen is None or self._lost(weight, codec, codes, grid, gram) <= allowed:
                chosen = codes, grid
        if chosen is None:
            raise RecipeError("pruned_rounding has no widths to try", hint="widths: [1.0]")
        return chosen

    def _sparsest(
        self,
        weight: Tensor,
        codec: GridCodec,
        grid: dict[str, Tensor],
        gram: Tensor,
        codes: Tensor,
        order: Tensor,
        allowed: float,
    ) -> Tensor:
        """Codes with as many zeros in each row as are allowed; `order` [R, C] ranks its weights."""
        zero = codec.snap(weight.new_zeros(weight.shape), grid)
        best = codes
        for share in sorted(self.pruned):
            first = order[:, : int(share * weight.shape[1])]
            fewer = codes.scatter(1, first, zero.gather(1, first))
            if self._lost(weight, codec, fewer, grid, gram) > allowed:
                break
            best = fewer
        return best

    def _lost(
        self, weight: Tensor, codec: GridCodec, codes: Tensor, grid: dict[str, Tensor], gram: Tensor
    ) -> float:
        error = weight - codec.value(codes, grid)
        return ops.channel_factors.output_energy(error[None], gram[None])
