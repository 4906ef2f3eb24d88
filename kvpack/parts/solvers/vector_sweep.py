"""Vectors chosen one after the other, each knowing the errors of those before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.lazy import torch
from kvpack.core.measured import gram_matrix, warn_not_definite
from kvpack.core.roles import Codec, Solver, VectorCodec
from kvpack.core.types import Solution, Stat, Stats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VectorSweep(Solver):
    """Makes the codebooks of a vector codec, and chooses its codes by what they do to the outputs.

    First k-means of the weight's vectors, channels weighed by the energy of their inputs (the diagonal
    of the Gram matrix G) and rows by the square of their scale. Then a sweep: each vector takes the
    code that is the nearest in the metric of what later columns cannot make good, and these absorb
    its error. Then `steps` conjugate gradients move the codebooks to the least output error
    ``trace((W - Q) G (W - Q)^T)`` for these codes. `rounds` repeats sweep and move.

    `damp` and `block` are as of `gptq`, and so are channels that calibration never activated; where the
    Gram matrix cannot be inverted, every vector takes its nearest code, with a warning. Source: GPTVQ,
    arXiv 2402.15319; k-means is weighed by the diagonal, and conjugate gradients stand in for
    gradient descent.
    """

    damp: float = field(default=0.01, metadata={"minimum": 1e-6, "maximum": 1.0})
    rounds: int = field(default=1, metadata={"minimum": 1, "maximum": 10})
    steps: int = field(default=5, metadata={"minimum": 0, "maximum": 100})
    block: int = field(default=128, metadata={"minimum": 1})

    teaches = True

    def requires(self) -> frozenset[Stat]:
        """The Gram matrix of the layer's inputs."""
        return frozenset({Stat("gram")})

    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Solution:
        """Encode `weight` [R, C], and make the codebooks.

        Raises:
            RecipeError: the codec has no codebooks of vectors.
            KvpackError: the Gram matrix is missing, has another size, or is not finite.
        """
        if not isinstance(codec, VectorCodec):
            raise RecipeError(
                f"vector_sweep cannot choose codes for {type(codec).__name__}",
                hint="use codec: {kind: shared_vectors}, or solver: {kind: gptq}",
            )
        weight, channels = weight.float(), weight.shape[1]
        gram = gram_matrix(stats, channels, "vector_sweep").float()
        upper = ops.gptq.inverse_factor(gram, self.damp)
        gram = self._damped(gram)
        if upper is None:
            warn_not_definite("vector_sweep", "every vector takes its nearest code")
            upper = torch.eye(channels, device=weight.device)
        scales, per_book = codec.scales(weight), codec.group_size(channels) // codec.size
        own = torch.arange(channels // codec.size, device=weight.device) // per_book
        scale = scales.float()[:, own]
        state = codec.store(
            ops.gptq_vectors.fit_books(weight, scale, gram.diagonal(), 2**codec.bits, codec.size, per_book)
        )
        for _ in range(self.rounds):
            books = codec.books(state)
            codes = ops.gptq_vectors.solve(weight, scale, books, upper, per_book, block=self.block)
            books = ops.gptq_vectors.refit(weight, scale, codes, books, gram, per_book, steps=self.steps)
            state = codec.store(books)
        return Solution(codec.assemble(codes, scales), state)

    def _damped(self, gram: Tensor) -> Tensor:
        """G as its factor knows it: no channel counts for nothing."""
        diagonal = gram.diagonal()
        active = diagonal[diagonal != 0]
        mean = float(active.mean()) if len(active) else 1.0
        return gram + torch.diag(torch.where(diagonal == 0, mean, 0.0) + self.damp * mean)
