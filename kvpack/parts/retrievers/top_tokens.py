"""The tokens with the highest scores, besides the first and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.roles import Retriever

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TopTokens(Retriever):
    """A fixed share of the context per query head.

    Of n visible tokens, a query head reads the first `sink_tokens`, the newest `recent_tokens` (its
    own among them), and of the others the max(`minimum`, floor(`fraction` n)) with the highest
    scores; the older one of two equal scores may win. Source: A2ATS, arXiv 2502.12665.
    """

    fraction: float = field(default=0.03, metadata={"minimum": 0.0, "maximum": 1.0})
    minimum: int = field(default=1, metadata={"minimum": 0})
    sink_tokens: int = field(default=8, metadata={"minimum": 0})
    recent_tokens: int = field(default=64, metadata={"minimum": 1})

    def select(self, scores: Tensor, visible: Tensor) -> Tensor:
        """First, newest and best tokens."""
        always = self.always(visible)
        counts = ops.top_tokens.share(visible.sum(-1, keepdim=True), self.fraction, self.minimum)
        return ops.top_tokens.best(scores, visible & ~always, counts) | always

    def always(self, visible: Tensor) -> Tensor:
        """The first and the newest tokens."""
        return visible & ~ops.top_tokens.between(visible, self.sink_tokens, self.recent_tokens)

    def most(self, tokens: int) -> int:
        """Sinks, window and share; no more than there are."""
        share = max(self.minimum, int(self.fraction * tokens))
        return min(tokens, self.sink_tokens + self.recent_tokens + share)
