"""Two bits per number: a sign and one of two magnitudes per group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.roles import GridCodec
from kvpack.core.types import CodedRows, Payload, Shape, State, TensorSpec
from kvpack.kernels.codecs import LookupCodec

if TYPE_CHECKING:
    from torch import Tensor

BITS = 2


@dataclass(frozen=True)
class MirroredLevels(LookupCodec, GridCodec):
    """``x ~ one of {-a, -b, b, a}``, with a and b for every `size` channels (0: all of a row).

    For numbers with few small ones among them, such as the weights that pruning leaves: their
    histogram has two humps, and an even grid spends levels on the gap between. a and b are the exact
    two-means of the group's magnitudes, see `kvpack.ops.mirrored`. A last group may be shorter.

    Payload for [..., T, D]: "codes" uint8 [..., T, ceil(D/4)]; "small" and "large" float16
    [..., T, ceil(D/size)]: 2 + 32/size bits per number. Idea: AccLLM, arXiv 2505.03745.
    """

    size: int = field(default=64, metadata={"minimum": 0})

    def group_size(self, channels: int) -> int:
        """Channels that share a pair of magnitudes."""
        return ops.affine.group_size(channels, self.size)

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Codes and two magnitudes per group."""
        *outer, channels = shape
        levels = TensorSpec((*outer, -(-channels // (self.size or channels))), "float16")
        codes = TensorSpec((*outer, (channels * BITS + 7) // 8), "uint8")
        return {"codes": codes, "small": levels, "large": levels}

    def grid(self, x: Tensor, valid: Tensor | None = None) -> State:
        """The magnitudes of every group; tokens stand alone."""
        return ops.mirrored.fit(x, self.group_size(x.shape[-1]))

    def snap(self, x: Tensor, grid: State) -> Tensor:
        """Nearest codes of `x` on `grid`."""
        return ops.mirrored.snap(x, grid, self.group_size(x.shape[-1]))

    def value(self, codes: Tensor, grid: State) -> Tensor:
        """The numbers that `codes` stand for."""
        return ops.mirrored.value(codes, grid, self.group_size(codes.shape[-1]))

    def assemble(self, codes: Tensor, grid: State) -> Payload:
        """Pack chosen codes beside their magnitudes."""
        return Payload({"codes": ops.bits.pack(codes, BITS), **grid}, tuple(codes.shape))

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Fit magnitudes to `x` and take the nearest level."""
        grid = self.grid(x)
        return self.assemble(self.snap(x, grid), grid)

    def coded_rows(self, payload: Payload, state: State) -> CodedRows:
        """Codes and the levels of their groups."""
        codes, small, large = (payload.tensors[name] for name in ("codes", "small", "large"))
        channels = payload.shape[-1]
        group = self.group_size(channels)
        return CodedRows("mirrored", codes, BITS, channels, group, small, large, channels)
