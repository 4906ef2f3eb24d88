"""Round to nearest: each weight on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack.core.lazy import torch
from kvpack.core.pieces import row_pieces
from kvpack.core.roles import Codec, Solver
from kvpack.core.types import Payload, Solution, Stats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rtn(Solver):
    """The codec's own encoding; needs no data."""

    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Solution:
        """Encode `weight` [R, C] as it is, some rows at a time: memory stays near the payload's."""
        pieces = [
            codec.encode(weight[start:stop], {}).tensors
            for start, stop in row_pieces(weight.shape[0], weight.shape[1], codec.token_block)
        ]
        tensors = {name: torch.cat([piece[name] for piece in pieces], -2) for name in pieces[0]}
        return Solution(Payload(tensors, tuple(weight.shape)))
