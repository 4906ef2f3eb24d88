"""Uniform quantisation with one scale, and one zero point, per group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.lazy import torch
from kvpack.core.roles import GridCodec
from kvpack.core.types import Group, Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Affine(GridCodec):
    """Integers of `bits` bits on an evenly spaced grid per group.

    Channel groups make every token stand alone (a ragged last group is allowed); token groups
    share a grid among `group.size` consecutive tokens of one channel, or rows of a weight.

    Payload for [..., T, D]: "codes" uint8 [..., T, ceil(D*bits/8)]; "scale" and, unless `zero` is
    "none", "zero": [..., T, ceil(D/size)] for channel groups, [..., T/size, D] for token groups.

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
        if self.group.axis == "token" and self.group.size == 0:
            raise RecipeError(
                "a group over all tokens cannot be appended to", hint="give the token group a size"
            )

    @property
    def token_block(self) -> int:
        """`group.size` for token groups, else 1."""
        return self.group.size if self.group.axis == "token" else 1

    def group_size(self, channels: int) -> int:
        """Channels per grid entry; 1 for token groups."""
        return 1 if self.group.axis == "token" else min(self.group.size or channels, channels)

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Payload tensors for an input of `shape`.

        Raises:
            RecipeError: the tokens do not fill whole groups.
        """
        *outer, tokens, channels = shape
        if tokens % self.token_block:
            raise RecipeError(
                f"{tokens} tokens (or rows) cannot be split into groups of {self.token_block}",
                hint="choose a group size that divides them, or group along channels",
            )
        groups = (*outer, tokens // self.token_block, -(-channels // self.group_size(channels)))
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
        mask = None
        if valid is not None and axis == "token":
            batch, tokens = valid.shape
            mask = valid.reshape(batch, *(1,) * (x.dim() - 3), tokens, 1)
            mask = ops.affine.split(mask, axis, size)
        low, high = ops.affine.value_range(
            ops.affine.split(x.float(), axis, size), ops.affine.group_axis(axis), mask
        )
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

    def assemble(self, codes: Tensor, grid: State) -> Payload:
        """Pack chosen codes beside their grid."""
        return Payload({"codes": ops.bits.pack(codes, self.bits), **grid}, tuple(codes.shape))

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Fit a grid to `x` and round to it."""
        grid = self.grid(x, valid)
        return self.assemble(self.snap(x, grid), grid)

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The approximation in `dtype`."""
        grid = {name: t for name, t in payload.tensors.items() if name != "codes"}
        codes = ops.bits.unpack(payload.tensors["codes"], self.bits, payload.shape[-1])
        return self.value(codes, grid).to(dtype)

    def _broadcast(self, grid: State) -> tuple[Tensor, Tensor | None]:
        dim = ops.affine.group_axis(self.group.axis)
        zero = grid.get("zero")
        return grid["scale"].unsqueeze(dim), None if zero is None else zero.unsqueeze(dim)
