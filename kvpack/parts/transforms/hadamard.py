"""Hadamard rotation of one head, or of several heads together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvpack import ops
from kvpack.core.errors import KvpackError
from kvpack.core.lazy import torch
from kvpack.core.roles import RowTransform
from kvpack.core.rows import Spread
from kvpack.core.types import Shape, Site, State

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hadamard(RowTransform):
    """Spreads outlier channels evenly: z = H x / sqrt(g*D) over the g*D channels of g heads.

    g is the largest divisor of K that does not exceed `heads`. Lengths that are not powers of two
    use the matrices of `kvpack.ops.hadamard`. A transform that merges heads must follow this one,
    not precede it. Sources: QuaRot, arXiv 2404.00456 (one head); RotateKV, arXiv 2501.16383,
    section 3.1 (groups of heads).
    """

    orthonormal: ClassVar[bool] = True

    heads: int = field(default=1, metadata={"minimum": 1})

    def shape(self, shape: Shape) -> Shape:
        """[B, K, T, D] -> [B, K/g, T, g*D]."""
        batch, heads, tokens, channels = shape
        g = self._merged(heads)
        return (batch, heads // g, tokens, g * channels)

    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Merge heads and rotate."""
        g = self._merged(x.shape[1])
        if g > 1:
            x = torch.unflatten(x, 1, (x.shape[1] // g, g)).transpose(2, 3).flatten(3)
        return ops.hadamard.transform(x)

    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Rotate back and separate the heads.

        Raises:
            KvpackError: several heads may be merged and `at.kv_heads` does not tell how many.
        """
        x = ops.hadamard.transform(z, inverse=True)
        if self.heads == 1:
            return x
        if at.kv_heads < z.shape[1] or at.kv_heads % z.shape[1]:
            raise KvpackError(
                f"layer {at.layer}: {z.shape[1]} merged heads cannot come from {at.kv_heads} kv heads",
                hint="pass Site(kv_heads=...) of the plane that entered the chain of transforms",
            )
        g = at.kv_heads // z.shape[1]
        return torch.unflatten(x, -1, (g, x.shape[-1] // g)).transpose(2, 3).flatten(1, 2) if g > 1 else x

    def row_steps(self, state: State, at: Site, channels: int) -> tuple[Spread]:
        """The transform of every group of heads."""
        return (Spread(self._merged(max(1, at.kv_heads)) * channels),)

    def dual(self, q: Tensor, state: State, at: Site) -> Tensor | None:
        """The same rotation, as H is orthonormal; None when several heads are rotated together."""
        if self.heads > 1 and (at.kv_heads == 0 or self._merged(at.kv_heads) > 1):
            return None
        return ops.hadamard.transform(q)

    def gradient(self, g: Tensor, state: State, at: Site) -> Tensor:
        """The same rotation: the transposed inverse of an orthonormal matrix is the matrix itself."""
        return self.forward(g, state, at)

    def _merged(self, heads: int) -> int:
        return max(g for g in range(1, min(self.heads, heads) + 1) if heads % g == 0)
