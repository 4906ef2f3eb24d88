"""Eight-bit floating point: every number on its own, no scale, nothing to calibrate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvpack.core.lazy import torch
from kvpack.core.rows import TokenRows
from kvpack.core.types import Payload, Shape, State, TensorSpec
from kvpack.kernels.codecs import RowCodec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cast(RowCodec):
    """Rounds to an 8-bit float, exactly 8.0 bits per element.

    `float8_e4m3fn` keeps 4 significant bits within +-448, `float8_e5m2` 3 within +-57344. Numbers
    beyond the range become its largest finite ones. Payload: "values" [..., T, D]. Source: FP8
    Formats for Deep Learning, arXiv 2209.05433, section 3.
    """

    dtype: Literal["float8_e4m3fn", "float8_e5m2"] = "float8_e4m3fn"

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """One byte per number."""
        return {"values": TensorSpec(tuple(shape), self.dtype)}

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Clamp to the finite range, then round to nearest even."""
        target = getattr(torch, self.dtype)
        limit = torch.finfo(target).max
        return Payload({"values": x.float().clamp(-limit, limit).to(target)}, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The stored numbers in `dtype`."""
        return payload.tensors["values"].to(dtype)

    def token_rows(self, payload: Payload, state: State) -> TokenRows:
        """The stored numbers."""
        return TokenRows(payload.tensors["values"])
