"""Linear layers whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpack.core import weight_code
from kvpack.core.errors import UsageError
from kvpack.core.roles import Codec, Transform
from kvpack.core.types import TensorSpec


@dataclass(frozen=True)
class PackedWeight:
    """How a linear layer is packed: by which parts, its shape (R, C), and its stored tensors.

    `inputs` approximates what the layer is given, after the transforms `online`; None: as it is.
    """

    codec: Codec
    shape: tuple[int, int]
    tensors: Mapping[str, TensorSpec]
    inputs: Codec | None = None
    online: tuple[Transform, ...] = ()


class PackedLinear(nn.Module):
    """``y = Q(T(x)) W^T + b`` where W [R, C] is stored as a codec's payload.

    The stored tensors are buffers under their own names ("codes", "scale", ...). They follow
    the module to other devices and keep their dtypes: ``model.half()`` casts the bias, never a
    scale, which would change what the codes mean.

    Args:
        weight: what is packed, and what happens to the input.
        bias: a bias [R] to take over, None for none.
        device: where the (uninitialised) buffers are made.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if "bias" in weight.tensors:
            raise UsageError(
                f"a payload tensor of {type(weight.codec).__name__} is called 'bias'", why="it would clash"
            )
        self.packed = weight
        self.out_features, self.in_features = weight.shape
        for name, spec in weight.tensors.items():
            buffer = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            self.register_buffer(name, buffer)
        self.bias = bias

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: self.get_buffer(name) for name in self.packed.tensors}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight [R, C]."""
        return weight_code.decode(self.packed.codec, self.stored, self.packed.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` [..., C]; the weight is decoded to the dtype of `x`."""
        states = weight_code.online_states(self.packed.online, self.stored, self.in_features)
        x = weight_code.prepare_input(x, self.packed.online, states, self.packed.inputs)
        return functional.linear(x, self.dense(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape and stored bits per weight."""
        stored = sum(t.nbytes for t in self.packed.tensors.values())
        bits = f"bits={8 * stored / (self.in_features * self.out_features):.2f}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let `fn` move the buffers but not cast them."""
        moved = {name: _without_cast(fn, self.get_buffer(name)) for name in self.packed.tensors}
        for name in self.packed.tensors:
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


def replace_linears(model: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Put packed layers, with buffers on the meta device, in the place of linear layers.

    Biases are taken over from the layers that go.

    Args:
        model: usually a skeleton on the meta device; changed in place.
        packed: what to put there, by module path.

    Raises:
        UsageError: a path does not lead to a linear layer of that shape.
    """
    for name, weight in packed.items():
        old = model.get_submodule(name)
        dense = getattr(old, "weight", None)
        found = tuple(dense.shape) if isinstance(dense, Tensor) else type(old).__name__
        if found != tuple(weight.shape):
            raise UsageError(f"{name} is {found}", why=f"the packed weight is {tuple(weight.shape)}")
        model.set_submodule(name, PackedLinear(weight, getattr(old, "bias", None), "meta"))
