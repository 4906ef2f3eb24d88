"""No compression: the numbers themselves, in the dtype they come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack.core.roles import Codec
from kvpack.core.types import Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Identity(Codec):
    """Keeps its input bit for bit: the codec of an exact tier."""

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """One tensor like the input."""
        return {"values": TensorSpec(shape, dtype)}

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Hold `x` itself."""
        return Payload({"values": x}, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The input, in `dtype`."""
        return payload.tensors["values"].to(dtype)
