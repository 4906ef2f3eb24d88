"""GPTQ over columns in classes of salience, with searched clipping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.lazy import torch
from kvpack.core.measured import gram_matrix, measured, warn_not_definite
from kvpack.core.roles import ClassedCodec, Codec, GridCodec, Solver
from kvpack.core.types import Solution, Stat, State, Stats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SalienceSweep(Solver):
    """Ranks input channels, then rounds class after class, each column knowing the errors before it.

    With G the damped Gram matrix of the inputs and inv(G) = U^T U, the salience of channel k is the
    sum of w_ik^2 over the rows i of all layers that are given the same input (they share one
    division), times G_kk ("energy": what the outputs lose without the channel), 1 / U_kk^2
    ("factor": what they lose when the channels behind it make up for it, as in the official code of
    SliM-LLM; it favours channels that stand late) or 1 / [inv(G)]_kk^2 ("inverse": the paper).

    The sweep passes the classes in their stored order. When it reaches a group, the grid's range is
    cut at both ends by the pair of strengths that loses least on the weights as corrected by then:
    `clip_steps` strengths from 1 down to `clip_least` for each end alone; one step cuts nothing.
    `clip_metric` weighs the squared error of a column by its entry on the diagonal of G ("energy"),
    by 1 / U_kk^2 of the sweep ("factor") or not at all ("plain"). Codecs with one grid for all
    channels are swept as one class: then this is GPTQ with searched clipping.

    `damp` and `block` are as of `gptq`, and so are dead channels and matrices that cannot be
    inverted. Source: MLWQ, EMNLP 2025, sections 3.3 and 3.4; GPTQ, arXiv 2210.17323.
    """

    salience: Literal["energy", "factor", "inverse"] = "energy"
    clip_steps: int = field(default=6, metadata={"minimum": 1, "maximum": 64})
    clip_least: float = field(default=0.7, metadata={"minimum": 0.05, "maximum": 1.0})
    clip_metric: Literal["energy", "factor", "plain"] = "energy"
    damp: float = field(default=0.01, metadata={"minimum": 1e-6, "maximum": 1.0})
    block: int = field(default=128, metadata={"minimum": 1})

    teaches = True

    def requires(self) -> frozenset[Stat]:
        """The Gram matrix of the layer's inputs, and the weights of all layers that are given them."""
        return frozenset({Stat("gram"), Stat("weight", of="consumers")})

    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Solution:
        """Encode `weight` [R, C] and, for a codec with classes, divide its channels.

        Raises:
            RecipeError: the codec has neither classes nor grids of channels.
            KvpackError: statistics are missing, have another size, or are not finite.
        """
        channels = weight.shape[1]
        classes = _classes(codec, weight)
        gram = gram_matrix(stats, channels, "salience_sweep")
        upper = ops.gptq.inverse_factor(gram, self.damp)
        state: State = {}
        order = torch.arange(channels, device=weight.device)
        if isinstance(codec, ClassedCodec):
            rows = measured(stats, "consumers.weight", "weight", (-1, channels), "salience_sweep")
            state = codec.rank(self._salience(rows, gram, upper))
            order = codec.order(state, channels).to(weight.device)
        if state:
            gram = gram[order][:, order]
            upper = ops.gptq.inverse_factor(gram, self.damp) if upper is not None else None
        if upper is None:
            warn_not_definite("salience_sweep", "this weight is rounded to nearest")
            return Solution(codec.encode(weight, state), state)
        spans = self._spans(classes, gram, upper)
        found = ops.gptq_classes.solve(weight.float()[:, order], upper, spans, block=self.block)
        parts = [grids.assemble(*one) for one, (_, grids) in zip(found, classes, strict=True)]
        return Solution(parts[0] if not isinstance(codec, ClassedCodec) else codec.join(parts), state)

    def _salience(self, rows: Tensor, gram: Tensor, upper: Tensor | None) -> Tensor:
        """Of every channel, [C]; by the energy of its inputs where the matrix cannot be inverted."""
        weights = rows.float().square().sum(0)
        if upper is None or self.salience == "energy":
            return weights * gram.diagonal()
        if self.salience == "factor":
            return weights / upper.diagonal().square()
        return weights / upper.square().sum(0).square()

    def _spans(
        self, classes: tuple[tuple[int, GridCodec], ...], gram: Tensor, upper: Tensor
    ) -> list[ops.gptq_classes.Span]:
        tried = ops.clip_search.pairs(self.clip_steps, self.clip_least, independent=True)
        metric = {
            "energy": gram.diagonal(),
            "factor": upper.diagonal().square().reciprocal(),
            "plain": torch.ones_like(gram.diagonal()),
        }[self.clip_metric]
        spans = []
        parts = torch.split(metric, [count for count, _ in classes])
        for part, (count, grids) in zip(parts, classes, strict=True):
            size = grids.group_size(count)
            fit = ops.clip_search.fitter(part, size, grids, tried)
            spans.append(ops.gptq_classes.Span(count, size, fit, grids.snap, grids.value))
        return spans


def _classes(codec: Codec, weight: Tensor) -> tuple[tuple[int, GridCodec], ...]:
    if isinstance(codec, ClassedCodec):
        return codec.classes(weight.shape[1])
    grids = codec.gridded(weight)
    if grids is not None and grids.token_block == 1:
        return ((weight.shape[1], grids),)
    raise RecipeError(
        f"salience_sweep cannot choose codes for {type(codec).__name__} as configured",
        hint="use codec: {kind: column_classes, ...} or one with groups along channels, such as affine",
    )
