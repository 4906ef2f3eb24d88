"""One bit per number: its sign, with one magnitude per group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.grouping import bounded_block, grid_shape
from kvpack.core.lazy import torch
from kvpack.core.roles import Codec
from kvpack.core.types import Group, Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Binary(Codec):
    """``x ~ alpha sign(x)`` with alpha = mean |x| of the group, which minimises the squared error.

    Zero counts as positive. Bits per element: 1 + 16/size.

    Payload for [..., T, D]: "codes" uint8 [..., T, ceil(D/8)], bit 1 for numbers that are not
    negative; "scale" float16 [..., T/size, D] for token groups, [..., T, ceil(D/size)] for channel
    groups. Source: VidKV, arXiv 2503.16257, section 3 (1-bit keys); the scale is XNOR-Net's, arXiv
    1603.05279, equation 6.

    Raises:
        RecipeError: a token group without a size.
    """

    group: Group = field(default_factory=lambda: Group("token", 32))

    def __post_init__(self) -> None:
        bounded_block(self.group)

    @property
    def token_block(self) -> int:
        """`group.size` for token groups, else 1."""
        return bounded_block(self.group)

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Signs and scales.

        Raises:
            RecipeError: the tokens do not fill whole groups.
        """
        *outer, tokens, channels = shape
        return {
            "codes": TensorSpec((*outer, tokens, -(-channels // 8)), "uint8"),
            "scale": TensorSpec(grid_shape(shape, self.group), "float16"),
        }

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Signs, and the mean magnitude of the numbers that count."""
        axis, size = self.group.axis, self.group.size
        scale = ops.magnitude.group_mean(x, ops.magnitude.counted(x, valid), axis, size)
        signs = ops.bits.pack((x >= 0).to(torch.uint8), 1)
        return Payload({"codes": signs, "scale": ops.magnitude.stored(scale)}, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """Plus or minus the scale."""
        codes = ops.bits.unpack(payload.tensors["codes"], 1, payload.shape[-1])
        scale = payload.tensors["scale"].float()
        scale = ops.magnitude.spread(scale, self.group.axis, self.group.size, payload.shape[-1])
        return (scale * (codes.float() * 2 - 1)).to(dtype)
