"""Balance the ranges of queries and keys, channel by channel, as the prompt has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvpack import ops
from kvpack.core.lazy import torch
from kvpack.core.roles import Transform
from kvpack.core.types import Shape, Site, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ChannelBalance(Transform):
    """``k' = b k`` and ``q' = q / b`` with ``b_c = sqrt(max|q_c| / max|k_c|)``, so that q'k' = qk.

    The maxima are over the first tokens that a cache is given, per row, kv head and channel, and
    over all query heads of the kv head; padding does not count. Where a maximum is 0, b is 1, and so
    it is for rows of fewer than `least_tokens` first tokens, whose maxima say nothing about those to
    come. It is clamped to [`least`, 1 / `least`]. State of the cache: "scale" float16 [B, K, D]; before there
    is one, nothing is scaled. Source: MiKV, arXiv 2402.18096, section 4 (the clamp is ours: float16
    has to hold scaled keys; so is `least_tokens`).
    """

    least: float = field(default=0.01, metadata={"minimum": 1e-4, "maximum": 1.0})
    least_tokens: int = field(default=16, metadata={"minimum": 1})

    linear: ClassVar[bool] = False
    """It is linear, but not known before there is a prompt, so that it cannot be folded."""

    fits_prompt: ClassVar[bool] = True

    def fit_prompt(self, x: Tensor, queries: Tensor, valid: Tensor | None, rows: Tensor | None) -> State:
        """The balance of one prompt."""
        keys, asked = _peak(x, valid), _peak(queries, rows)
        scale = (asked / keys).sqrt().clamp(self.least, 1 / self.least)
        tokens = x.new_full((len(x),), x.shape[2]) if valid is None else valid.sum(-1)
        enough = (tokens >= self.least_tokens).reshape(-1, 1, 1)
        scale = torch.where(enough & (keys > 0) & (asked > 0), scale, 1.0)
        return {"scale": scale.half()}

    def prompt_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Two bytes per channel."""
        return {"scale": TensorSpec((shape[0], shape[1], shape[3]), "float16")}

    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Multiply keys."""
        return x.float() * _of_heads(state, x) if state else x.float()

    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Divide them again, which is dividing the queries."""
        return z.float() / _of_heads(state, z) if state else z.float()

    def dual(self, q: Tensor, state: State, at: Site) -> Tensor | None:
        """Divide queries [B, G*K, T, D]."""
        return q.float() / _of_heads(state, q) if state else q.float()


def _peak(x: Tensor, valid: Tensor | None) -> Tensor:
    """Largest magnitude per channel, float32 [B, K, D]."""
    size = x.float().abs()
    return (size if valid is None else size.masked_fill(~ops.rows.mask(valid, x), 0.0)).amax(-2)


def _of_heads(state: State, x: Tensor) -> Tensor:
    """The scale for `x` [B, K or G*K, T, D]."""
    scale = state["scale"].float().unsqueeze(-2)
    return scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)
