"""Round to nearest: each weight on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack.core.roles import Codec, Solver
from kvpack.core.types import Payload, Stats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rtn(Solver):
    """The codec's own encoding; needs no data."""

    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Payload:
        """Encode `weight` [R, C] as it is."""
        return codec.encode(weight, {})
