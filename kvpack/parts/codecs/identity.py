"""No compression: the numbers themselves, in the dtype they come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvpack.core.rows import TokenRows
from kvpack.core.types import Payload, Shape, State, TensorSpec
from kvpack.kernels.codecs import RowCodec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Identity(RowCodec):
    """Keeps its input bit for bit: the codec of an exact tier."""

    exact: ClassVar[bool] = True

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """One tensor like the input."""
        return {"values": TensorSpec(shape, dtype)}

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Hold `x` itself."""
        return Payload({"values": x}, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The input, in `dtype`."""
        return payload.tensors["values"].to(dtype)

    def token_rows(self, payload: Payload, state: State) -> TokenRows:
        """The stored numbers."""
        return TokenRows(payload.tensors["values"])
