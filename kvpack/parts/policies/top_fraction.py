"""The most important tokens get the better codec."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack.core.errors import RecipeError
from kvpack.core.lazy import torch
from kvpack.core.roles import Plane, Scorer, TierPolicy
from kvpack.core.types import CacheView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TopFraction(TierPolicy):
    """`high` holds floor(`share` * T) of T tokens, those that `scorer` ranks first; `low` the others.

    Every row of a batch and every kv head choose for themselves. The newest tokens stay exact:
    `recent_tokens` always, and beyond them up to `interval` - 1, because tokens leave `interval` at
    a time (rounded up to whole token blocks).

    Without `demote` the tier of a token is decided once, when its chunk is encoded (ZipCache, arXiv
    2405.14256, algorithm 2). With it the share holds among all tokens at every step: tokens that
    fall out of `high` are decoded, encoded as `low` ones, and never come back (MiKV, arXiv
    2402.18096, section 4). `recent_share` of `high` is reserved for the newest tokens of the row,
    and `high` holds at least `least_tokens` unless `share` is 0.

    Raises:
        RecipeError: a share that is none.
    """

    scorer: Scorer = field()
    share: float = field(default=0.6, metadata={"minimum": 0.0, "maximum": 1.0})
    recent_tokens: int = field(default=0, metadata={"minimum": 0})
    interval: int = field(default=128, metadata={"minimum": 1})
    recent_share: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 1.0})
    least_tokens: int = field(default=0, metadata={"minimum": 0})
    demote: bool = False
    inside: str = "recent"
    high: str = "high"
    low: str = "low"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not 0 <= self.recent_share <= 1:
            raise RecipeError("shares of tokens lie between 0 and 1")

    @property
    def coded(self) -> tuple[str, ...]:
        """`high`, then `low`."""
        return (self.high, self.low)

    def leaving(self, tail_tokens: int, block: int, plane: Plane) -> int:
        """Whole intervals of what lies before the newest `recent_tokens`."""
        step = -(-self.interval // block) * block
        return max(0, tail_tokens - self.recent_tokens) // step * step

    def placement(self, tokens: int, block: int, plane: Plane) -> tuple[int, ...]:
        """The share of one chunk of `tokens` tokens, and the rest."""
        high = self._count(tokens)
        return (high, tokens - high)

    def important(self, tokens: Tensor) -> Tensor:
        """`share` of the tokens, rounded down, but at least `least_tokens`."""
        counts = [self._count(n) for n in tokens.tolist()]
        return torch.tensor(counts, dtype=torch.int64, device=tokens.device)

    def _count(self, tokens: int) -> int:
        least = self.least_tokens if self.share else 0
        # A share is a decimal number: 0.7 * 10 must not be 6.
        return max(int(self.share * tokens + 1e-9), min(least, tokens))

    def choose(self, scores: Tensor, candidates: Tensor, valid: Tensor) -> Tensor:
        """The newest of each row as far as they are reserved, then the highest scores."""
        if self.recent_share:
            reserved = (self.important(valid.sum(-1)) * self.recent_share).round().long()
            age = valid.long().flip(-1).cumsum(-1).flip(-1)
            newest = valid & (age <= reserved.unsqueeze(-1))
            scores = scores.masked_fill(newest.unsqueeze(1), float("inf"))
        return super().choose(scores, candidates, valid)

    def protect(self, view: CacheView) -> Tensor | None:
        """None: what is important is encoded with more bits."""
        return None

    def protected_tokens(self) -> int:
        """0."""
        return 0
