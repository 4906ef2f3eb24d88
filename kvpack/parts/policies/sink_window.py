"""The first tokens and a window of the newest ones are all that is kept."""

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
class SinkWindow(TierPolicy):
    """A query reads the `sink_tokens` first tokens of its row and the newest `window_tokens`, itself one.

    Everything between is dropped for good, so that memory does not grow with the context, and nothing
    in it can be recalled. Sinks are exact, and so are the newest `recent_tokens`, as of `sink_recent`;
    the rest of the window is encoded. Tokens keep their true positions: a sink's distance grows beyond
    the window. In layers whose own window is no larger this is `sink_recent`. Sources: LM-Infinite,
    arXiv 2308.16137 (the Lambda-shaped mask); StreamingLLM, arXiv 2309.17453; AccLLM, arXiv 2505.03745.

    Raises:
        RecipeError: more exact tokens than the window holds.
    """

    sink_tokens: int = field(default=4, metadata={"minimum": 0})
    window_tokens: int = field(default=1020, metadata={"minimum": 1})
    recent_tokens: int = field(default=32, metadata={"minimum": 0})
    inside: str = "recent"
    outside: str = "old"

    def __post_init__(self) -> None:
        if self.recent_tokens > self.window_tokens:
            raise RecipeError(
                f"{self.recent_tokens} exact tokens do not fit into a window of {self.window_tokens}",
                hint="make recent_tokens smaller than window_tokens",
            )

    @property
    def window(self) -> int:
        """`window_tokens`."""
        return self.window_tokens

    @property
    def coded(self) -> tuple[str, ...]:
        """`outside` alone."""
        return (self.outside,)

    def leaving(self, tail_tokens: int, block: int, plane: Plane) -> int:
        """Tokens beyond the exact ones; see `kvpack.ops.window.leaving`."""
        return ops.window.leaving(tail_tokens, block, self.recent_tokens)

    def protect(self, view: CacheView) -> Tensor | None:
        """The first `sink_tokens` tokens of each row that are not padding."""
        return ops.window.first_tokens(view.seen, view.valid, view.tokens, self.sink_tokens)

    def protected_tokens(self) -> int:
        """`sink_tokens`."""
        return self.sink_tokens
