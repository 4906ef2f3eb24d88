"""A product of two thin matrices per head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.lazy import torch
from kvpack.core.roles import Codec
from kvpack.core.types import Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank(Codec):
    """Head-wise ``Q P^T`` of rank `rank`, found by `iterations` steps of power iteration.

    The tokens of a segment share one P, so a segment is decoded as a whole. Segments are made of
    whole runs of `chunk_tokens` and are at most `segment_tokens` long; those of at most
    `short_tokens` tokens get `short_rank`. No rank exceeds min(T, D). Rows of tokens that do not
    count are zero. Bits per element: 16 r (T + D) / (T D).

    Payload for [..., T, D]: "left" float16 [..., T, r] (Q, orthonormal columns), "right" float16
    [..., D, r] (P). Source: GEAR, arXiv 2403.05527, section 3 and algorithm 2.

    Raises:
        RecipeError: a segment that does not hold whole chunks.
    """

    rank: int = field(metadata={"minimum": 1})
    short_rank: int = field(default=2, metadata={"minimum": 1})
    short_tokens: int = field(default=64, metadata={"minimum": 0})
    iterations: int = field(default=3, metadata={"minimum": 1})
    chunk_tokens: int = field(default=64, metadata={"minimum": 1})
    segment_tokens: int = field(default=4096, metadata={"minimum": 1})
    seed: int = 0

    def __post_init__(self) -> None:
        if self.segment_tokens % self.chunk_tokens:
            raise RecipeError(
                f"segments of {self.segment_tokens} tokens do not hold whole chunks of {self.chunk_tokens}",
                hint="make segment_tokens a multiple of chunk_tokens",
            )

    @property
    def token_block(self) -> int:
        """`chunk_tokens`."""
        return self.chunk_tokens

    @property
    def segment(self) -> int:
        """`segment_tokens`."""
        return self.segment_tokens

    def rank_of(self, tokens: int, channels: int) -> int:
        """Rank of a segment of `tokens` tokens."""
        wanted = self.short_rank if tokens <= self.short_tokens else self.rank
        return min(wanted, tokens, channels)

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """The two factors of one segment.

        Raises:
            RecipeError: the tokens do not fill whole chunks.
        """
        *outer, tokens, channels = shape
        if tokens % self.chunk_tokens:
            raise RecipeError(
                f"{tokens} tokens (or rows) cannot be split into chunks of {self.chunk_tokens}",
                hint="choose chunk_tokens that divide them",
            )
        rank = self.rank_of(tokens, channels)
        return {
            "left": TensorSpec((*outer, tokens, rank), "float16"),
            "right": TensorSpec((*outer, channels, rank), "float16"),
        }

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Factor `x`, every head alone."""
        if valid is not None:
            x = x.masked_fill(~ops.rows.mask(valid, x), 0)
        left, right = ops.low_rank.factors(x, self.rank_of(*x.shape[-2:]), self.iterations, self.seed)
        limit = torch.finfo(torch.float16).max
        return Payload({"left": left.half(), "right": right.clamp(-limit, limit).half()}, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The product of the factors."""
        return (payload.tensors["left"].float() @ payload.tensors["right"].float().mT).to(dtype)

    @property
    def reads_codes(self) -> bool:
        """Always."""
        return True

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """``(q P) Q^T``."""
        left, right = (payload.tensors[name].float() for name in ("left", "right"))
        return query.float() @ right @ left.mT

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """``(w Q) P^T``."""
        left, right = (payload.tensors[name].float() for name in ("left", "right"))
        return weights.float() @ left @ right.mT
