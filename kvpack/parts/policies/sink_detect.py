"""Tokens with massive activations stay exact, wherever they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvpack import ops
from kvpack.core.errors import KvpackError
from kvpack.core.lazy import torch
from kvpack.core.roles import Plane, TierPolicy
from kvpack.core.types import CacheView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SinkDetect(TierPolicy):
    """Keeps the tokens that hold the `top_values` largest |hidden| of a row exact.

    `hidden` is the decoder layer's input; the search runs over tokens and channels of each row
    together, so several values usually fall on one token. Padding is not searched. Updates of a
    single token are never protected. Source: RotateKV, arXiv 2501.16383, section 3.3. Deviation:
    every update of several tokens is searched, not only the first. A later one protects what
    enters the largest values of all that were searched, so that further turns of a conversation
    are covered while short pieces of a prompt do not each claim their own sinks.
    """

    top_values: int = field(default=20, metadata={"minimum": 1})
    recent_tokens: int = field(default=0, metadata={"minimum": 0})
    inside: str = "recent"
    outside: str = "old"

    needs_hidden: ClassVar[bool] = True

    @property
    def coded(self) -> tuple[str, ...]:
        """`outside` alone."""
        return (self.outside,)

    def leaving(self, tail_tokens: int, block: int, plane: Plane) -> int:
        """Tokens beyond the window; see `kvpack.ops.window.leaving`."""
        return ops.window.leaving(tail_tokens, block, self.recent_tokens)

    def protect(self, view: CacheView) -> Tensor | None:
        """Tokens with the largest activations of this update.

        Raises:
            KvpackError: the view lacks `hidden`.
        """
        if view.tokens == 1:
            return None
        if view.hidden is None:
            raise KvpackError(
                f"layer {view.layer}: sink_detect needs the layer's input, and the cache did not get it",
                hint="run the model through kvpack.load, which installs the hook that passes it on",
            )
        magnitude = view.hidden.abs().float()
        if view.valid is not None:
            magnitude = magnitude.masked_fill(~view.valid.unsqueeze(-1), -1.0)
        values, where = magnitude.flatten(1).topk(min(self.top_values, magnitude[0].numel()), dim=-1)
        largest = values
        if "largest" in view.memory:
            largest = torch.cat((view.memory["largest"], values), -1)
            largest = largest.topk(min(self.top_values, largest.shape[-1]), dim=-1).values
        view.memory["largest"] = largest
        found = torch.zeros((view.batch, view.tokens), dtype=torch.bool, device=values.device)
        found = found.scatter(1, where // magnitude.shape[-1], values >= largest[:, -1:])
        return found if view.valid is None else found & view.valid

    def protected_tokens(self) -> int:
        """`top_values`: at worst every value belongs to another token."""
        return self.top_values
