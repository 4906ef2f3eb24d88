"""Linear layers whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpack.core.errors import UsageError
from kvpack.core.roles import Codec
from kvpack.core.types import Payload, TensorSpec


class PackedLinear(nn.Module):
    """``y = x W^T + b`` where W [R, C] is stored as a codec's payload.

    The payload's tensors are buffers under their own names ("codes", "scale", ...). They follow
    the module to other devices and keep their dtypes: ``model.half()`` casts the bias, never a
    scale, which would change what the codes mean.

    Args:
        codec: decodes the weight.
        shape: (R, C).
        specs: payload tensors.
        bias: a bias [R] to take over, None for none.
        device: where the (uninitialised) buffers are made.
    """

    def __init__(
        self,
        codec: Codec,
        shape: tuple[int, int],
        specs: Mapping[str, TensorSpec],
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if "bias" in specs:
            raise UsageError(
                f"a payload tensor of {type(codec).__name__} is called 'bias'", why="it would clash"
            )
        self.codec = codec
        self.out_features, self.in_features = shape
        self.payload_names = tuple(specs)
        for name, spec in specs.items():
            buffer = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            self.register_buffer(name, buffer)
        self.bias = bias

    @property
    def payload(self) -> Payload:
        """The packed weight."""
        tensors = {name: self.get_buffer(name) for name in self.payload_names}
        return Payload(tensors, (self.out_features, self.in_features))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight [R, C]."""
        return self.codec.decode(self.payload, {}, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` [..., C]; the weight is decoded to the dtype of `x`."""
        return functional.linear(x, self.dense(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape and stored bits per weight."""
        bits = f"bits={self.payload.bits_per_element:.2f}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let `fn` move the buffers but not cast them."""
        moved = {name: _without_cast(fn, self.get_buffer(name)) for name in self.payload_names}
        for name in self.payload_names:
            del self._buffers[name]
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        finally:
            self._buffers.update(moved)


def _without_cast(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn(tensor)`` in the dtype of `tensor`."""
    result = fn(tensor)
    if result.dtype == tensor.dtype:
        return result
    return torch.empty_like(result, dtype=tensor.dtype) if tensor.is_meta else tensor.to(result.device)


PackedShape = tuple[Codec, tuple[int, int], Mapping[str, TensorSpec]]
"""Codec, (R, C) and payload specs of a packed linear layer."""


def replace_linears(model: nn.Module, packed: Mapping[str, PackedShape]) -> None:
    """Put packed layers, with buffers on the meta device, in the place of linear layers.

    Biases are taken over from the layers that go.

    Args:
        model: usually a skeleton on the meta device; changed in place.
        packed: what to put there, by module path.

    Raises:
        UsageError: a path does not lead to a linear layer of that shape.
    """
    for name, (codec, shape, specs) in packed.items():
        old = model.get_submodule(name)
        weight = getattr(old, "weight", None)
        found = tuple(weight.shape) if isinstance(weight, Tensor) else type(old).__name__
        if found != tuple(shape):
            raise UsageError(f"{name} is {found}", why=f"the packed weight is {tuple(shape)}")
        model.set_submodule(name, PackedLinear(codec, shape, specs, getattr(old, "bias", None), "meta"))
