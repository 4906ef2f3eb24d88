"""Three levels per number: minus, zero and plus one magnitude per group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.grouping import bounded_block, grid_shape
from kvpack.core.lazy import torch
from kvpack.core.roles import Codec
from kvpack.core.types import Group, Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ternary(Codec):
    """``x ~ alpha t`` with t in {-1, 0, 1}: t = 0 where ``|x| <= threshold * mean |x|`` of the group.

    `alpha` is the mean of |x| over the group ("mean", VidKV) or over the numbers with a code other
    than zero ("nonzero_mean", the least squared error for these codes). Bits per element:
    1.6 + 16/size, and what the last byte of a token block leaves empty.

    Payload for [..., T, D] and token blocks of b tokens: "codes" uint8 [..., T/b, ceil(b*D/5)], t + 1
    five to a byte, token after token; "scale" float16 [..., T/size, D] for token groups, [..., T,
    ceil(D/size)] for channel groups. Source: VidKV, arXiv 2503.16257, section 3 (1.58-bit values).

    Raises:
        RecipeError: a token group without a size.
    """

    group: Group = field(default_factory=lambda: Group("token", 32))
    threshold: float = field(default=0.5, metadata={"minimum": 0.0, "maximum": 2.0})
    alpha: Literal["mean", "nonzero_mean"] = "mean"

    def __post_init__(self) -> None:
        bounded_block(self.group)

    @property
    def token_block(self) -> int:
        """`group.size` for token groups, else 1."""
        return bounded_block(self.group)

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Codes and scales.

        Raises:
            RecipeError: the tokens do not fill whole groups.
        """
        *outer, tokens, channels = shape
        block = self.token_block
        return {
            "codes": TensorSpec((*outer, tokens // block, -(-block * channels // 5)), "uint8"),
            "scale": TensorSpec(grid_shape(shape, self.group), "float16"),
        }

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Compare with the mean magnitude of the numbers that count."""
        axis, size = self.group.axis, self.group.size
        counts = ops.magnitude.counted(x, valid)
        scale = ops.magnitude.group_mean(x, counts, axis, size)
        limit = self.threshold * ops.magnitude.spread(scale, axis, size, x.shape[-1])
        above = x.float().abs() > limit
        if self.alpha == "nonzero_mean":
            scale = ops.magnitude.group_mean(x, counts & above, axis, size)
        codes = torch.where(above, torch.where(x > 0, 2, 0), 1).to(torch.uint8)
        codes = ops.affine.split(codes, "token", self.token_block).flatten(-2)
        tensors = {"codes": ops.trits.pack(codes), "scale": ops.magnitude.stored(scale)}
        return Payload(tensors, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The scale times -1, 0 or 1."""
        channels = payload.shape[-1]
        codes = ops.trits.unpack(payload.tensors["codes"], self.token_block * channels)
        codes = codes.reshape(payload.shape)
        scale = payload.tensors["scale"].float()
        scale = ops.magnitude.spread(scale, self.group.axis, self.group.size, channels)
        return (scale * (codes.float() - 1)).to(dtype)
