"""A packed weight: the payload of its codec beside what that codec has learned for this weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvpack.core.roles import Codec, Transform
from kvpack.core.types import Payload, Shape, Site, Solution, State, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def stored_spec(codec: Codec, shape: Shape, dtype: str) -> dict[str, TensorSpec]:
    """All tensors of a packed weight [R, C] of `dtype`, before any data exists: payload, then state.

    Raises:
        ValueError: a payload tensor and a state tensor have the same name.
    """
    payload, state = codec.spec(shape, dtype), codec.state_spec((1, *shape))
    if clash := sorted(payload.keys() & state.keys()):
        raise ValueError(f"{type(codec).__name__} stores two tensors called {clash[0]!r}")
    return payload | state


def online_name(index: int, name: str) -> str:
    """Name of a tensor that the `index`-th online transform of a packed layer learned."""
    return f"online{index}_{name}"


def online_spec(transforms: Sequence[Transform], channels: int) -> dict[str, TensorSpec]:
    """What online transforms of a layer with `channels` input channels store."""
    shape = (1, 1, 1, channels)
    return {
        online_name(i, name): spec
        for i, transform in enumerate(transforms)
        for name, spec in transform.state_spec(shape).items()
    }


def online_states(
    transforms: Sequence[Transform], tensors: Mapping[str, Tensor], channels: int
) -> list[State]:
    """The states of online transforms, from the stored tensors of a layer."""
    shape = (1, 1, 1, channels)
    return [
        {name: tensors[online_name(i, name)] for name in transform.state_spec(shape)}
        for i, transform in enumerate(transforms)
    ]


NOWHERE = Site(layer=-1)
"""Transforms of a linear layer's input know of no layer, position or head."""


def prepare_input(
    x: Tensor, transforms: Sequence[Transform], states: Sequence[State], inputs: Codec | None
) -> Tensor:
    """A layer's input [..., C] in the basis of its weight, and as the codec for inputs gives it back."""
    if not transforms and inputs is None:
        return x
    rows = x.reshape(1, 1, -1, x.shape[-1])
    for transform, state in zip(transforms, states, strict=True):
        rows = transform.forward(rows, state, NOWHERE)
    rows = rows.to(x.dtype)
    if inputs is not None:
        rows = inputs.decode(inputs.encode(rows, {}), {}, x.dtype)
    return rows.reshape(x.shape)


def solution(codec: Codec, tensors: Mapping[str, Tensor], shape: Shape) -> Solution:
    """Stored tensors, taken apart into payload and state."""
    learned = codec.state_spec((1, *shape)).keys()
    payload = {name: tensor for name, tensor in tensors.items() if name not in learned}
    return Solution(Payload(payload, tuple(shape)), {name: tensors[name] for name in learned})


def decode(codec: Codec, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
    """The weight [R, C] that stored tensors stand for."""
    found = solution(codec, tensors, shape)
    return codec.decode(found.payload, found.state, dtype)
