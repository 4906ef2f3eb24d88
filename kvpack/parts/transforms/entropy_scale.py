"""Divide every channel by a factor, chosen so that the codes of the weights become compressible."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.lazy import torch
from kvpack.core.roles import Codec, DiagonalTransform, GridCodec, Transform
from kvpack.core.types import Stat, State, Stats

if TYPE_CHECKING:
    from torch import Tensor

_STATS = (Stat("channel_range"), Stat("head_gram"), Stat("weight", of="consumers"))


@dataclass(frozen=True)
class EntropyScale(DiagonalTransform):
    """x / s with s = max|x|^a / max|w|^(1-a), the a that gives the weights' codes the least entropy.

    The larger a, the more of the activations' outliers go into a few columns of the weights; the bulk
    of the codes then crowds around zero, and a lossless coder has less to write. Of `steps` values
    between `least` and `most` the best whose squared output error, relative to the outputs, stays
    below `error` is taken; changing nothing is tried as well. `step`: one quantisation step for the
    whole weight, or one per row. State: "factor" float32 [K, D]. `codec` is filled in by the plan.

    Source: double compression, arXiv 2502.15443; its formulas are not public, this is a reconstruction.
    """

    least: float = field(default=0.3, metadata={"minimum": 0.0, "maximum": 1.0})
    most: float = field(default=0.9, metadata={"minimum": 0.0, "maximum": 1.0})
    steps: int = field(default=13, metadata={"minimum": 1})
    error: float = field(default=1e-3, metadata={"minimum": 0.0})
    step: Literal["tensor", "row"] = "tensor"
    codec: Codec | None = None

    def for_codec(self, codec: Codec | None) -> Transform:
        """The search for this codec.

        Raises:
            RecipeError: no layer here is packed, or not on symmetric grids.
        """
        wanted = self.codec or codec
        if not isinstance(wanted, GridCodec) or getattr(wanted, "zero", "") != "none":
            raise RecipeError(
                "entropy_scale needs layers that are packed on symmetric grids",
                hint="for example codec: {kind: affine, bits: 8, group: {size: 0}, zero: none}",
            )
        return replace(self, codec=wanted)

    def requires(self) -> frozenset[Stat]:
        """Ranges, Gram matrices, and the weights that read the channels."""
        return frozenset(_STATS)

    def fit(self, stats: Stats) -> State:
        """Try all factors.

        Raises:
            KvpackError: a statistic is missing or not finite.
        """
        try:
            peak, top = ops.channel_factors.peaks(stats)
            gram, weight = stats["head_gram"]["gram"], stats["consumers.weight"]["weight"]
        except (KeyError, ValueError) as error:
            raise KvpackError(
                f"entropy_scale cannot be fitted: {error}",
                hint="calibrate again with sound text and weights",
            ) from error
        whole = ops.channel_factors.output_energy(weight, gram)
        best = torch.ones_like(peak, dtype=torch.float32)
        least, _ = self._judged(weight, gram, best)
        for alpha in torch.linspace(self.least, self.most, self.steps).tolist():
            factor = ops.channel_factors.balanced(peak, top, alpha, 1 - alpha, 100.0)
            bits, lost = self._judged(weight, gram, factor)
            if bits < least and lost <= self.error * whole:
                best, least = factor, bits
        return {"factor": best}

    def _judged(self, weight: Tensor, gram: Tensor, factor: Tensor) -> tuple[float, float]:
        """Bits per code, and the squared error of the outputs."""
        codec = self.codec
        if not isinstance(codec, GridCodec):
            raise KvpackError("entropy_scale got no codec", hint="this is a defect; please report it")
        wide = factor.unsqueeze(-2)
        scaled = weight * wide
        grid = codec.grid(scaled)
        if self.step == "tensor":
            grid["scale"] = ops.entropy.one_step(grid["scale"])
        codes = codec.snap(scaled, grid)
        lost = ops.channel_factors.output_energy(weight - codec.value(codes, grid) / wide, gram)
        return ops.entropy.entropy(codes), lost
