"""Signed mantissas with one shared power of two per block of channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.roles import GridCodec
from kvpack.core.rows import TokenRows
from kvpack.core.types import Payload, Shape, State, TensorSpec
from kvpack.kernels.codecs import RowCodec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class BlockFloat(RowCodec, GridCodec):
    """Block floating point: `mantissa` bits with sign, an 8-bit exponent per `block` channels.

    Every token stands alone. The last block of a token may be shorter, and a block of 0 is all
    channels. NaN is taken for 0, infinities for the largest finite numbers.

    Payload for [..., T, D]: "codes" uint8 [..., T, ceil(D*mantissa/8)] and "exponent" uint8
    [..., T, ceil(D/block)]: mantissa + 8/block bits per number where blocks are full. Formulas:
    `kvpack.ops.block_float`. Source: arXiv 2403.20137, where BFP12 has 4 mantissa bits and BFP16 8.

    Raises:
        RecipeError: a mantissa that cannot hold a sign and a number, or a negative block.
    """

    mantissa: int = field(default=4, metadata={"minimum": 2, "maximum": 8})
    block: int = field(default=32, metadata={"minimum": 0})

    def __post_init__(self) -> None:
        if not 2 <= self.mantissa <= 8:
            raise RecipeError(f"a mantissa of {self.mantissa} bits", hint="use 2 to 8 bits, sign included")
        if self.block < 0:
            raise RecipeError(f"a block of {self.block} channels", hint="use 0 for all channels")

    def group_size(self, channels: int) -> int:
        """Channels of a full block."""
        return min(self.block or channels, channels)

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Payload tensors for an input of `shape`."""
        *outer, channels = shape
        return {
            "codes": TensorSpec((*outer, (channels * self.mantissa + 7) // 8), "uint8"),
            "exponent": TensorSpec((*outer, -(-channels // self.group_size(channels))), "uint8"),
        }

    def grid(self, x: Tensor, valid: Tensor | None = None) -> State:
        """The exponent of every block."""
        return {"exponent": ops.block_float.exponents(self._split(_finite(x)).abs().amax(-1))}

    def snap(self, x: Tensor, grid: State) -> Tensor:
        """Nearest codes of `x` on `grid`."""
        codes = ops.block_float.codes(self._split(_finite(x)), self._step(grid), self.mantissa)
        return ops.affine.join(codes, "channel", x.shape[-1])

    def value(self, codes: Tensor, grid: State) -> Tensor:
        """The numbers that `codes` stand for."""
        values = ops.block_float.values(self._split(codes), self._step(grid), self.mantissa)
        return ops.affine.join(values, "channel", codes.shape[-1])

    def assemble(self, codes: Tensor, grid: State) -> Payload:
        """Pack chosen codes beside their exponents."""
        return Payload({"codes": ops.bits.pack(codes, self.mantissa), **grid}, tuple(codes.shape))

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Find the exponents of `x` and round."""
        grid = self.grid(x, valid)
        return self.assemble(self.snap(x, grid), grid)

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The approximation in `dtype`."""
        codes = ops.bits.unpack(payload.tensors["codes"], self.mantissa, payload.shape[-1])
        return self.value(codes, {"exponent": payload.tensors["exponent"]}).to(dtype)

    def token_rows(self, payload: Payload, state: State) -> TokenRows:
        """The codes on a symmetric grid whose steps are the powers of two."""
        codes, steps = payload.tensors["codes"], self._step(payload.tensors).squeeze(-1)
        grid = (steps, None, self.mantissa, "channel", self.block, payload.shape[-1])
        return TokenRows(ops.packed_affine.AffineCodes(codes, *grid))

    def _split(self, x: Tensor) -> Tensor:
        return ops.affine.split(x, "channel", self.block)

    def _step(self, grid: Mapping[str, Tensor]) -> Tensor:
        return ops.block_float.steps(grid["exponent"], self.mantissa).unsqueeze(-1)


def _finite(x: Tensor) -> Tensor:
    return x.float().nan_to_num(0.0)
