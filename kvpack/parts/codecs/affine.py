"""Uniform quantisation with one scale, and one zero point, per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from kvpack import kernels, ops
from kvpack.core.errors import RecipeError
from kvpack.core.grouping import grid_shape
from kvpack.core.lazy import torch
from kvpack.core.roles import Codec, GridCodec
from kvpack.core.rows import TokenRows
from kvpack.core.types import CodedRows, EvenGrid, Group, Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from kvpack.ops.packed_affine import AffineCodes


SEGMENT_TOKENS = 4096
SEGMENT_STEP = 4
"""More than one token, so that policies empty their window as a whole instead of token by token."""


@dataclass(frozen=True)
class Affine(GridCodec):
    """Integers of `bits` bits on an evenly spaced grid per group.

    Channel groups make every token stand alone (a ragged last group is allowed); token groups
    share a grid among `group.size` consecutive tokens of one channel, or rows of a weight. A token
    group of size 0 is a whole segment of up to 4096 tokens (in a cache: what leaves the exact
    window at once, in steps of 4), and can only be decoded as a whole.

    Payload for [..., T, D]: "codes" uint8 [..., T, ceil(D*bits/8)]; "scale" and, unless `zero` is
    "none", "zero": [..., T, ceil(D/size)] for channel groups, [..., T/size, D] for token groups,
    [..., 1, D] for a segment.

    The grids, and the rounding that keeps every error within half a step, are defined in
    `kvpack.ops.affine`. `zero`: "float" is the group's minimum (KIVI, arXiv 2402.02750), stored in
    `scale_dtype` (float16 beside a float8 scale); "integer" is an int8 code (RotateKV, arXiv
    2501.16383); "none" is symmetric about zero. `clip` shrinks the range on both sides.

    Raises:
        RecipeError: settings that contradict each other.
    """

    bits: int = field(default=4, metadata={"minimum": 1, "maximum": 8})
    group: Group = field(default_factory=Group)
    zero: Literal["float", "integer", "none"] = "float"
    scale_dtype: Literal["float16", "bfloat16", "float32", "float8_e4m3fn"] = "float16"
    clip: float = field(default=1.0, metadata={"minimum": 0.05, "maximum": 1.0})

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise RecipeError(f"affine codes cannot have {self.bits} bits", hint="use 1 to 8 bits")
        if self.bits == 1 and self.zero == "none":
            raise RecipeError("a symmetric grid of 1 bit has no positive code", hint="use zero: float")

    @property
    def token_block(self) -> int:
        """`group.size` for token groups (4 where it is 0), else 1."""
        return (self.group.size or SEGMENT_STEP) if self.group.axis == "token" else 1

    @property
    def segment(self) -> int:
        """4096 for token groups of size 0: they have no end of their own."""
        return SEGMENT_TOKENS if self.group == Group("token", 0) else 0

    def group_size(self, channels: int) -> int:
        """Channels per grid entry; 1 for token groups."""
        return 1 if self.group.axis == "token" else min(self.group.size or channels, channels)

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Payload tensors for an input of `shape`.

        Raises:
            RecipeError: the tokens do not fill whole groups.
        """
        *outer, tokens, channels = shape
        groups = grid_shape(shape, self.group)
        specs = {
            "codes": TensorSpec((*outer, tokens, (channels * self.bits + 7) // 8), "uint8"),
            "scale": TensorSpec(groups, self.scale_dtype),
        }
        if self.zero == "float":
            narrow = self.scale_dtype == "float8_e4m3fn"
            specs["zero"] = TensorSpec(groups, "float16" if narrow else self.scale_dtype)
        elif self.zero == "integer":
            specs["zero"] = TensorSpec(groups, "int8")
        return specs

    def grid(self, x: Tensor, valid: Tensor | None = None) -> State:
        """Scale and zero of every group of `x` [..., T, D]."""
        axis, size = self.group.axis, self.group.size
        if valid is not None and axis == "token":
            mask = ops.affine.split(ops.rows.mask(valid, x), axis, size)
            groups = ops.affine.split(x.float(), axis, size)
            low, high = ops.affine.value_range(groups, ops.affine.group_axis(axis), mask)
        else:
            low, high = kernels.affine_encode.value_range(x, axis, size)
        return ops.affine.fit(low, high, self.bits, self.zero, getattr(torch, self.scale_dtype), self.clip)

    def snap(self, x: Tensor, grid: State) -> Tensor:
        """Nearest codes of `x` on `grid`."""
        axis = self.group.axis
        split = ops.affine.split(x.float(), axis, self.group.size)
        codes = ops.affine.codes(split, *self._broadcast(grid), self.bits)
        return ops.affine.join(codes, axis, x.shape[-1])

    def value(self, codes: Tensor, grid: State) -> Tensor:
        """The numbers that `codes` stand for."""
        axis = self.group.axis
        split = ops.affine.split(codes, axis, self.group.size)
        values = ops.affine.values(split, *self._broadcast(grid), self.bits)
        return ops.affine.join(values, axis, codes.shape[-1])

    def even(self, grid: State) -> EvenGrid | None:
        """Steps and offsets, where groups are channels."""
        if self.group.axis == "token":
            return None
        step, offset, centred = ops.affine.even(grid["scale"], grid.get("zero"), self.bits)
        return EvenGrid(step, offset, 2**self.bits - 1, centred)

    def assemble(self, codes: Tensor, grid: State) -> Payload:
        """Pack chosen codes beside their grid."""
        return Payload({"codes": ops.bits.pack(codes, self.bits), **grid}, tuple(codes.shape))

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Fit a grid to `x` and round to it."""
        axis, size, bits = self.group.axis, self.group.size, self.bits
        if valid is not None and axis == "token":
            grid = self.grid(x, valid)
            zero = grid.get("zero")
            codes = kernels.affine_encode.codes(x, grid["scale"], zero, bits, axis, size)
        else:
            stored = getattr(torch, self.scale_dtype)
            codes, grid = kernels.affine_encode.encode(x, bits, self.zero, stored, self.clip, axis, size)
        return Payload({"codes": codes, **grid}, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The approximation in `dtype`."""
        return kernels.affine.dense(self._packed(payload), dtype)

    @property
    def in_rows(self) -> bool:
        """Always."""
        return True

    def token_rows(self, payload: Payload, state: State) -> TokenRows:
        """The codes and their grid."""
        return TokenRows(self._packed(payload))

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """Products with the codes, a few rows at a time."""
        return kernels.affine.scores(query, self._packed(payload))

    def multiplier(self, payload: Payload, state: State) -> Callable[[Tensor], Tensor]:
        """Products with the codes, with everything but the rows prepared."""
        return kernels.affine.multiplier(self._packed(payload))

    def products_of_codes(self, codec: Codec, x: Payload, payload: Payload, state: State) -> Tensor | None:
        """On a GPU, where both are 8-bit integers."""
        if not isinstance(codec, Affine):
            return None
        return kernels.affine.integer_products(codec._packed(x), self._packed(payload))

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """Sums of the codes, a few rows at a time."""
        return kernels.affine.mix(weights, self._packed(payload))

    def attend(
        self,
        query: Tensor,
        payload: Payload,
        values: Codec,
        value_payload: Payload,
        start: int,
        tokens: int,
        mask: Tensor | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """On a GPU, where the values are affine codes as well."""
        if not isinstance(values, Affine):
            return None
        coded = self._packed(payload), values._packed(value_payload)
        return kernels.affine.attention(query, *coded, start, tokens, mask, softcap)

    def coded_rows(self, payload: Payload, state: State) -> CodedRows | None:
        """Codes and grids, where groups are channels."""
        if self.group.axis == "token":
            return None
        x = self._packed(payload)
        return CodedRows("even", x.codes, x.bits, x.channels, x.group, x.scale, x.zero, x.channels)

    def _packed(self, payload: Payload) -> AffineCodes:
        codes, scale = payload.tensors["codes"], payload.tensors["scale"]
        zero, group, channels = payload.tensors.get("zero"), self.group, payload.shape[-1]
        return ops.packed_affine.AffineCodes(codes, scale, zero, self.bits, group.axis, group.size, channels)

    def lowering(self, coarser: Codec) -> Callable[[Payload], Payload] | None:
        """Rounds codes, where the grid of `coarser` is a part of this one with the same ends.

        That is so when 2^b' - 1 divides 2^b - 1 for float zeros and unclipped ranges. The ratio is
        odd then, so that thresholds coincide as well and no code is rounded twice.
        """
        if not isinstance(coarser, Affine) or replace(coarser, bits=self.bits) != self:
            return None
        whole = (2**self.bits - 1) % (2**coarser.bits - 1) == 0
        fits = whole and self.zero == "float" and self.clip == 1.0
        return partial(self._lowered, coarser=coarser) if fits else None

    def _lowered(self, payload: Payload, coarser: Affine) -> Payload:
        """Codes rounded to the coarser grid; the zero stays, the step grows by the ratio."""
        ratio = (2**self.bits - 1) // (2**coarser.bits - 1)
        codes = ops.bits.unpack(payload.tensors["codes"], self.bits, payload.shape[-1])
        fewer = ((codes.int() + ratio // 2) // ratio).to(torch.uint8)
        scale = payload.tensors["scale"]
        grid = {
            "scale": ops.affine.round_towards(scale.float() * ratio, scale.dtype, up=True),
            "zero": payload.tensors["zero"],
        }
        return coarser.assemble(fewer, grid)

    def _broadcast(self, grid: State) -> tuple[Tensor, Tensor | None]:
        dim = ops.affine.group_axis(self.group.axis)
        zero = grid.get("zero")
        return grid["scale"].unsqueeze(dim), None if zero is None else zero.unsqueeze(dim)
