"""Linear layers whose weight stays packed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpack.core import weight_code
from kvpack.core.errors import UsageError
from kvpack.core.packed_bytes import PackedBytes, unpack
from kvpack.core.roles import Codec, Transform
from kvpack.core.types import Payload, State, TensorSpec
from kvpack.kernels import choice
from kvpack.runtime import linear_paths

PIECE_NUMBERS = 1 << 22
"""Numbers of a weight that are decoded at a time; few enough for a processor's last-level cache."""


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


class _Multiplier(NamedTuple):
    """A codec's multiplier, and the buffers it was made for."""

    buffers: tuple[Tensor | None, ...]
    products: Callable[[Tensor], Tensor]

    def serves(self, buffers: tuple[Tensor | None, ...]) -> bool:
        """Whether none was replaced since."""
        return all(map(operator.is_, buffers, self.buffers))


class PackedTensors(nn.Module):
    """A module whose weight [R, C] is stored as a codec's payload.

    The stored tensors are buffers under their own names ("codes", "scale", ...). They follow
    the module to other devices and keep their dtypes: ``model.half()`` casts other tensors, never a
    scale, which would change what the codes mean.

    A buffer may itself hold packed bytes (its spec is `PackedBytes`). The module computes with what
    is `lent` to it, else it unpacks them every time. `label` names it in errors.
    """

    packed: PackedWeight
    label: str
    lent: dict[str, Tensor] | None
    _learned: frozenset[str]
    _multiplier: _Multiplier | None
    _owner: tuple[PackedTensors, ...]

    def hold(self, weight: PackedWeight, device: torch.device | str | None) -> None:
        """Make the (uninitialised) buffers of `weight` on a device.

        Raises:
            UsageError: a stored tensor has the name of something that the module has already.
        """
        self.packed, self._owner, self.lent, self.label = weight, (), None, ""
        self._multiplier = None
        self._learned = frozenset(weight.codec.state_spec((1, *weight.shape)))
        for name, spec in weight.tensors.items():
            if name == "bias" or hasattr(self, name):
                raise UsageError(
                    f"a payload tensor of {type(weight.codec).__name__} is called {name!r}",
                    why="it would clash",
                )
            held = spec.stored if isinstance(spec, PackedBytes) else spec
            buffer = torch.empty(held.shape, dtype=getattr(torch, held.dtype), device=device)
            self.register_buffer(name, buffer)

    def borrow(self, owner: PackedTensors) -> None:
        """Compute with the tensors of another module: state dicts and memory have them once."""
        # In a tuple, because a registered submodule would be stored a second time.
        self.packed, self._owner = replace(owner.packed, tensors={}), (owner,)
        self._learned = owner._learned
        self.lent, self.label, self._multiplier = None, "", None

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        if self._owner:
            return self._owner[0].stored
        lent = self.lent
        return self.unpacked() if lent is None else lent

    @property
    def blobs(self) -> dict[str, PackedBytes]:
        """What the buffers stand for that hold packed bytes, by name."""
        return {name: s for name, s in self.packed.tensors.items() if isinstance(s, PackedBytes)}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without what is lent."""
        return sum(self.get_buffer(name).nbytes for name in self.packed.tensors)

    def unpacked(self) -> dict[str, Tensor]:
        """The stored tensors by name; those that are packed in memory are unpacked anew.

        Raises:
            ArtifactError: a block is damaged; names the tensor.
        """
        blobs, buffers = self.blobs, self._buffers
        held = {name: cast(Tensor, buffers[name]) for name in self.packed.tensors}
        return {n: unpack(t, blobs[n], f"{self.label}.{n}") if n in blobs else t for n, t in held.items()}

    def keep_unpacked(self) -> None:
        """Unpack what is packed in memory, for good."""
        tensors = self.unpacked()
        for name, spec in self.blobs.items():
            self._buffers[name] = tensors[name]
            self.packed = replace(
                self.packed, tensors={**self.packed.tensors, name: TensorSpec(spec.shape, spec.dtype)}
            )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight [R, C]."""
        return weight_code.decode(self.packed.codec, self.stored, self.packed.shape, dtype)

    def products_of_codes(self, x: Tensor) -> Tensor:
        """``x W^T`` [N, R] of rows `x` [N, C], computed on the codes."""
        held, made = tuple(self._buffers.values()), self._multiplier
        if made is None or not made.serves(held):
            payload, state = self._coded()
            made = _Multiplier(held, self.packed.codec.multiplier(payload, state))
            # What is lent, or unpacked for this product, lies elsewhere the next time.
            self._multiplier = None if self._owner or self.lent is not None or self.blobs else made
        return made.products(x)

    def _coded(self) -> tuple[Payload, State]:
        """What is stored, as the codec knows it."""
        stored, learned = self.stored, self._learned
        payload = {name: tensor for name, tensor in stored.items() if name not in learned}
        return Payload(payload, self.packed.shape), {name: stored[name] for name in learned}

    def products_of_decoded(self, x: Tensor) -> Tensor:
        """``x W^T`` [N, R] of rows `x` [N, C]; the weight is decoded some rows at a time."""
        codec, (rows, channels) = self.packed.codec, self.packed.shape
        (payload, state), dtype = self._coded(), linear_paths.dense_dtype(self, x)
        numbers, out = x.to(dtype), x.new_empty((len(x), rows))
        step = max(1, PIECE_NUMBERS // channels // codec.token_block) * codec.token_block
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            piece = payload if stop - start == rows else payload.rows(start, stop)
            weight = codec.decode(piece, state, dtype)
            out[:, start:stop] = functional.linear(numbers, weight)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: a multiplier knows this module's memory, no other's."""
        return {**self.__dict__, "_multiplier": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let `fn` move the buffers but not cast them."""
        moved = {name: _without_cast(fn, self.get_buffer(name)) for name in self.packed.tensors}
        for name in self.packed.tensors:
            del self._buffers[name]
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        finally:
            self._buffers.update(moved)


class PackedLinear(PackedTensors):
    """``y = Q(T(x)) W^T + b`` where W is packed.

    Args:
        weight: what is packed, and what happens to the input; or the module whose packed weight this
            layer shares.
        bias: a bias [R] to take over, None for none.
        device: where the (uninitialised) buffers are made.
    """

    def __init__(
        self,
        weight: PackedWeight | PackedTensors,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(weight, PackedTensors):
            self.borrow(weight)
        else:
            self.hold(weight, device)
        self.out_features, self.in_features = self.packed.shape
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` [..., C]: on the codes for few rows, else through decoded weights."""
        found = None if self.packed.inputs is None else self._products_of_both_codes(x, self.packed.inputs)
        if found is None:
            x = weight_code.prepare_input(x, self.packed.online, self.packed.inputs)
            if x.requires_grad:
                return functional.linear(x, self.dense(x.dtype), self.bias)
            rows = x.reshape(-1, self.in_features)
            few = linear_paths.on_codes(self, rows)
            found = self.products_of_codes(rows) if few else self.products_of_decoded(rows)
        if self.bias is not None:
            found += self.bias
        return found.reshape(*x.shape[:-1], self.out_features)

    def _products_of_both_codes(self, x: Tensor, inputs: Codec) -> Tensor | None:
        """Products [N, R] of coded inputs with the codes of the weight; None where no kernel makes them."""
        if x.requires_grad or not choice.on_gpu(x):
            return None
        coded = inputs.encode(weight_code.in_basis(x, self.packed.online), {})
        found = self.packed.codec.products_of_codes(inputs, coded, *self._coded())
        return None if found is None else found.to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and stored bits per weight."""
        stored = (self._owner[0] if self._owner else self).nbytes
        bits = f"bits={8 * stored / (self.in_features * self.out_features):.2f}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {bits}"


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
