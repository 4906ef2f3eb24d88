"""Uniform codes twice: 8 bits with a float step per row, then fewer bits per group of integers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import kernels, ops
from kvpack.core.lazy import torch
from kvpack.core.roles import Codec, GridCodec
from kvpack.core.types import Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from kvpack.ops.packed_affine import AffineCodes


@dataclass(frozen=True)
class TwoLevel(Codec):
    """``x ~ s0 * (q * s1 + z)`` with integers s1 and z per group of channels and a float s0 per row.

    The number in brackets always fits a signed byte, so that a product with 8-bit inputs needs no
    floats before the last step. The row's step covers the protective range, +-119 for 4 bits, see
    `kvpack.ops.two_level`. Codes are chosen from the number itself, not from its rounded byte, and
    s1 is whichever integer next to the exact step errs less. A last group may be shorter.

    Payload for [..., T, D]: "codes" uint8 [..., T, ceil(D*bits/8)]; "step" uint8 and "low" int8
    [..., T, ceil(D/size)]; "scale" float16 [..., T, 1]: bits + 16/size + 16/D bits per number.
    Source: QServe, arXiv 2405.04532, section 4.1.
    """

    bits: int = field(default=4, metadata={"minimum": 2, "maximum": 7})
    size: int = field(default=128, metadata={"minimum": 1})

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Codes, integer grids of groups and the rows' steps."""
        *outer, channels = shape
        groups = (*outer, -(-channels // self.size))
        return {
            "codes": TensorSpec((*outer, (channels * self.bits + 7) // 8), "uint8"),
            "step": TensorSpec(groups, "uint8"),
            "low": TensorSpec(groups, "int8"),
            "scale": TensorSpec((*outer, 1), "float16"),
        }

    def gridded(self, x: Tensor) -> GridCodec:
        """The integer grids, under the steps of these rows."""
        return _Rows(self, ops.two_level.row_step(x.float(), self.bits))

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Fit steps and grids to `x` and round to them; every row stands alone."""
        rows = self.gridded(x)
        grid = rows.grid(x)
        return rows.assemble(rows.snap(x, grid), grid)

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The approximation in `dtype`."""
        return kernels.affine.dense(self._affine(payload), dtype)

    @property
    def reads_codes(self) -> bool:
        """Always."""
        return True

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """Products with the codes, a few rows at a time."""
        return kernels.affine.scores(query, self._affine(payload))

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """Sums of the codes, a few rows at a time."""
        return kernels.affine.mix(weights, self._affine(payload))

    def _affine(self, payload: Payload) -> AffineCodes:
        """Both levels as one: steps and zeros are products of integers with the rows' steps."""
        tensors, channels = payload.tensors, payload.shape[-1]
        grid = ops.two_level.as_affine({n: tensors[n] for n in ("step", "low")}, tensors["scale"])
        return ops.packed_affine.AffineCodes(
            tensors["codes"], grid["scale"], grid["zero"], self.bits, "channel", self.size, channels
        )


@dataclass(frozen=True)
class _Rows(GridCodec):
    """The second level alone, for rows whose steps `scale` [..., T, 1] are fixed."""

    whole: TwoLevel
    scale: Tensor

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """As of the whole codec."""
        return self.whole.spec(shape, dtype)

    def group_size(self, channels: int) -> int:
        """Channels that share the integers "step" and "low"."""
        return min(self.whole.size, channels)

    def grid(self, x: Tensor, valid: Tensor | None = None) -> State:
        """Fit "step" and "low" [..., T, ceil(D/size)] to `x` [..., T, D]."""
        y = ops.two_level.bytes_of(x, self.scale, self.whole.bits)
        return ops.two_level.fit(y, self.whole.bits, self.whole.size)

    def snap(self, x: Tensor, grid: State) -> Tensor:
        """Nearest codes of `x` [..., T, D] itself, not of its rounded bytes."""
        y = ops.two_level.bytes_of(x, self.scale, self.whole.bits)
        return ops.two_level.snap(y, grid, self.whole.bits, self.whole.size)

    def value(self, codes: Tensor, grid: State) -> Tensor:
        """The numbers [..., T, D] that `codes` stand for, float32."""
        return ops.two_level.value(codes, grid, self.whole.size) * self.scale.float()

    def assemble(self, codes: Tensor, grid: State) -> Payload:
        """A payload of the whole codec: with the steps of the rows."""
        packed = ops.bits.pack(codes, self.whole.bits)
        return Payload({"codes": packed, **grid, "scale": self.scale}, tuple(codes.shape))

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Encode `x` with steps of its own rows."""
        return self.whole.encode(x, state, valid)

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """Decode with the steps that the payload holds."""
        return self.whole.decode(payload, state, dtype)
