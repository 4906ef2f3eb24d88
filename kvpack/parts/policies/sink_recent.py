"""The first tokens and the newest tokens stay exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.roles import Plane, TierPolicy
from kvpack.core.types import CacheView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SinkRecent(TierPolicy):
    """Keeps `sink_tokens` first and `recent_tokens` newest tokens of every row exact.

    The window of a codec with token blocks is `recent_tokens` rounded up to whole blocks. It is
    flushed as a whole when it is full, so it holds T mod window tokens, while the window of a
    codec without blocks always holds the newest min(recent_tokens, T). Source: KIVI, arXiv
    2402.02750, algorithm 1; sinks: Attention Sink, arXiv 2410.10781.
    """

    sink_tokens: int = field(default=0, metadata={"minimum": 0})
    recent_tokens: int = field(default=128, metadata={"minimum": 0})
    inside: str = "recent"
    outside: str = "old"

    @property
    def coded(self) -> tuple[str, ...]:
        """`outside` alone."""
        return (self.outside,)

    def leaving(self, tail_tokens: int, block: int, plane: Plane) -> int:
        """Tokens beyond the window; see `kvpack.ops.window.leaving`."""
        return ops.window.leaving(tail_tokens, block, self.recent_tokens)

    def protect(self, view: CacheView) -> Tensor | None:
        """The first `sink_tokens` tokens of each row that are not padding."""
        return ops.window.first_tokens(view.seen, view.valid, view.tokens, self.sink_tokens)

    def protected_tokens(self) -> int:
        """`sink_tokens`."""
        return self.sink_tokens
