"""Precision that steps down with age."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.roles import Plane, TierPolicy
from kvpack.core.types import CacheView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AgeStaircase(TierPolicy):
    """Blocks of `stair_tokens` tokens walk down a staircase of tiers, one step per full block.

    Fewer than `stair_tokens` new tokens are exact. When they fill a block it goes to the first of
    `rungs`, the block there to the second, and so on; the last rung keeps all that is older. The
    first `sink_tokens` tokens of every row stay exact. A prompt given at once goes directly to where
    it would have walked. Source: SAQ, arXiv 2410.18441, KV-cache section (a reconstruction of its
    listing); sinks: arXiv 2410.10781.

    Raises:
        RecipeError: no rungs.
    """

    stair_tokens: int = field(default=128, metadata={"minimum": 1})
    sink_tokens: int = field(default=0, metadata={"minimum": 0})
    inside: str = "recent"
    rungs: tuple[str, ...] = ("eight", "four", "two")

    def __post_init__(self) -> None:
        if not self.rungs:
            raise RecipeError("a staircase needs at least one rung", hint="name coded tiers in `rungs`")

    @property
    def coded(self) -> tuple[str, ...]:
        """`rungs`."""
        return self.rungs

    def leaving(self, tail_tokens: int, block: int, plane: Plane) -> int:
        """All whole stairs; a stair is rounded up to whole token blocks."""
        stair = self._stair(block)
        return tail_tokens // stair * stair

    def placement(self, tokens: int, block: int, plane: Plane) -> tuple[int, ...]:
        """One stair on every rung but the last."""
        stair, tiers = self._stair(block), []
        for _ in self.rungs[1:]:
            tiers.append(min(stair, tokens))
            tokens -= tiers[-1]
        return (*tiers, tokens)

    def _stair(self, block: int) -> int:
        return -(-self.stair_tokens // block) * block

    def protect(self, view: CacheView) -> Tensor | None:
        """The first `sink_tokens` tokens of each row that are not padding."""
        return ops.window.first_tokens(view.seen, view.valid, view.tokens, self.sink_tokens)

    def protected_tokens(self) -> int:
        """`sink_tokens`."""
        return self.sink_tokens
