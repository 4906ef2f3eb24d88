"""Undo the rotary position embedding of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvpack import kernels
from kvpack.core.roles import RowTransform
from kvpack.core.rows import Turn
from kvpack.core.types import Site, State

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Unrope(RowTransform):
    """Keys as they were before RoPE, where a channel keeps its meaning from token to token.

    RoPE mixes pairs of channels by an angle that depends on the position, which blurs channels
    with consistent values. `inverse` applies it again at the same positions. Sources: KVQuant,
    arXiv 2401.18079, section 3.2; RotateKV, arXiv 2501.16383, section 3.1.
    """

    linear: ClassVar[bool] = False
    needs_rope: ClassVar[bool] = True

    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Rotate `x` [B, K, T, D] back to position 0."""
        rope, positions = at.rotary("unrope")
        return rope.undo(x, positions)

    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Rotate `z` to its positions again."""
        rope, positions = at.rotary("unrope")
        return rope.apply(z.float(), positions)

    def row_steps(self, state: State, at: Site, channels: int) -> tuple[Turn]:
        """The turn of every head."""
        rope, positions = at.rotary("unrope")
        return (kernels.rows.turn(rope, positions, channels),)

    def gradient(self, g: Tensor, state: State, at: Site) -> Tensor:
        """Gradients rotate as keys do, but for the length of the rotation, which is one."""
        return self.forward(g, state, at)
