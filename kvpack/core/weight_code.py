"""A packed weight: the payload of its codec beside what that codec has learned for this weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvpack.core.lazy import torch
from kvpack.core.roles import Codec, Transform
from kvpack.core.types import Payload, Shape, Site, Solution, TensorSpec

if TYPE_CHECKING:
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


NOWHERE = Site(layer=-1)
"""Transforms of a linear layer's input know of no layer, position or head."""


def prepare_input(x: Tensor, transforms: Sequence[Transform], inputs: Codec | None) -> Tensor:
    """A layer's input [..., C] in the basis of its weight, and as the codec for inputs gives it back.

    `transforms` run one after the other; they learn nothing.
    """
    if not transforms and inputs is None:
        return x
    rows = in_basis(x, transforms)
    if inputs is not None:
        rows = inputs.decode(inputs.encode(rows, {}), {}, x.dtype)
    return rows.reshape(x.shape)


def in_basis(x: Tensor, transforms: Sequence[Transform]) -> Tensor:
    """A layer's input [..., C] in the basis of its weight, as tokens [1, 1, N, C]."""
    rows = x.reshape(1, 1, -1, x.shape[-1])
    for transform in transforms:
        rows = transform.forward(rows, transform.fit({}), NOWHERE)
    return rows.to(x.dtype)


def solution(codec: Codec, tensors: Mapping[str, Tensor], shape: Shape) -> Solution:
    """Stored tensors, taken apart into payload and state."""
    learned = codec.state_spec((1, *shape)).keys()
    payload = {name: tensor for name, tensor in tensors.items() if name not in learned}
    return Solution(Payload(payload, tuple(shape)), {name: tensors[name] for name in learned})


def decode(codec: Codec, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
    """The weight [R, C] that stored tensors stand for."""
    found = solution(codec, tensors, shape)
    return codec.decode(found.payload, found.state, dtype)


def decode_rows(
    codec: Codec, tensors: Mapping[str, Tensor], shape: Shape, places: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows of the weight [R, C]: [N, C] for `places` int64 [N]; no others than their blocks are decoded."""
    found, block = solution(codec, tensors, shape), codec.token_block
    near = codec.decode(found.payload.blocks(places // block, block), found.state, dtype)
    if block == 1:
        return near
    first = block * torch.arange(len(places), device=places.device)
    return near[first + places % block]
