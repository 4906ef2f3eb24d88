"""Undo the rotary position embedding of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpack import kernels
from kvpack.core.roles import RowTransform, UnropedTransform
from kvpack.core.rows import Turn
from kvpack.core.types import Site, State


@dataclass(frozen=True)
class Unrope(UnropedTransform, RowTransform):
    """Keys as they were before RoPE, where a channel keeps its meaning from token to token.

    RoPE mixes pairs of channels by an angle that depends on the position, which blurs channels
    with consistent values. `inverse` applies it again at the same positions. Sources: KVQuant,
    arXiv 2401.18079, section 3.2; RotateKV, arXiv 2501.16383, section 3.1.
    """

    kind: ClassVar[str] = "unrope"

    def row_steps(self, state: State, at: Site, channels: int) -> tuple[Turn]:
        """The turn of every head."""
        rope, positions = at.rotary(self.kind)
        return (kernels.rows.turn(rope, positions, channels),)
