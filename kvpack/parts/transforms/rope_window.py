"""Undo the rotary position embedding of keys; queries look at all of them from one distance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvpack.core.lazy import torch
from kvpack.core.roles import UnropedTransform
from kvpack.core.types import Site, State

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RopeWindow(UnropedTransform):
    """Keys before RoPE, and queries that see every key at the same distance `position`.

    With R_m the rotation to position m, a true score is ``(R_n q).(R_m k)``, which depends on n - m.
    The query side here is ``R_position q``: its product with the un-rotated key is the score that a
    key would have `position` tokens back, whatever m is (under YaRN, divided by the attention
    factor that keys carry, which changes no order). Keys nearer than a window have to be read
    without such a score; a retriever's window does that. Source: A2ATS, arXiv 2502.12665, windowed
    rotary position embedding.
    """

    position: int = field(default=2048, metadata={"minimum": 0})

    kind: ClassVar[str] = "rope_window"

    def query(self, q: Tensor, state: State, at: Site) -> Tensor:
        """Rotate queries [B, K, T, D] from their own positions to `position`."""
        rope, positions = at.rotary(self.kind)
        return rope.apply(rope.undo(q, positions), torch.full_like(positions, self.position))
