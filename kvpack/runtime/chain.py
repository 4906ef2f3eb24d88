"""Inputs stored as differences from the layer before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvpack.core.errors import KvpackError
from kvpack.core.roles import Plane
from kvpack.core.types import State
from kvpack.models.rematerialise import Rematerialiser
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.runtime.inputs import InputsLayer
from kvpack.runtime.tokens import TokenTrack


class Reconstruction:
    """The inputs of a layer as its codes give them, for the layer that follows; shared by a cache.

    It holds consecutive slots of the layer that is at work and of the one before it, and nothing
    between forward passes.

    Args:
        last: the last layer of the model.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._written: dict[int, tuple[int, Tensor]] = {}

    def put(self, layer: int, start: int, x: Tensor) -> None:
        """Write slots from `start` on, X^ [B, t, C]; they follow those of the layer, or replace them."""
        first, held = self._written.get(layer, (start, x[:, :0]))
        follows = first + held.shape[1] == start
        whole = (first, torch.cat((held, x), 1)) if follows and held.shape[1] else (start, x)
        before = {n: slots for n, slots in self._written.items() if n == layer - 1}
        self._written = before | {layer: whole}

    def of(self, layer: int, start: int, stop: int) -> Tensor:
        """Slots `start` to `stop` of a layer, [B, stop - start, C].

        Raises:
            KvpackError: the layer did not write them in this pass.
        """
        first, held = self._written.get(layer, (0, None))
        if held is None or start < first or stop > first + held.shape[1]:
            raise KvpackError(
                f"the inputs of layer {layer} are not there for the layer after it",
                why="layers that store differences must run one after another, none left out",
                hint="use a recipe without kv_cache.inputs.difference",
            )
        return held[:, start - first : stop - first]


class ChainedLayer(InputsLayer):
    """A layer whose stored inputs serve the next layer as reference, and that may use the last one's.

    A "difference" layer encodes D = X - X^', where X^' is the input of the layer before as its codes
    give it, and reads X^ = X^' + D^: what one layer gets wrong the next one's difference corrects, so
    errors do not add up. In a basis U it encodes D U and reads X^ = X^' + D^ U^T. A "base" layer does
    without X^'. Source: XQuant-CL, arXiv 2508.10395.
    """

    def __init__(
        self,
        plan: KVLayerPlan,
        states: Mapping[str, tuple[State, ...]],
        bases: Mapping[Plane, Tensor],
        remake: Rematerialiser,
        track: TokenTrack,
        reconstruction: Reconstruction,
        *,
        exact_prefill: bool = True,
    ) -> None:
        super().__init__(plan, states, bases, remake, track, exact_prefill=exact_prefill)
        self.reconstruction = reconstruction

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `KVPackLayer.update`; the last layer leaves nothing behind."""
        held = super().update(key_states, value_states, *args, **kwargs)
        if self._layer == self.reconstruction.last:
            self.reconstruction.clear()
        return held

    @property
    def _layer(self) -> int:
        return self.plan.attention.layer

    @property
    def _differs(self) -> bool:
        return self.plan.inputs is not None and self.plan.inputs.link == "difference"

    def _stored_inputs(self, name: Plane, start: int, stop: int) -> Tensor:
        """As codes and the layer before have it, and exact where it is not encoded yet."""
        x = super()._stored_inputs(name, start, stop)
        boundary = max(start, self._planes[name].boundary)
        if self._differs and boundary > start:
            x[:, : boundary - start] += self.reconstruction.of(self._layer - 1, start, boundary)
        self.reconstruction.put(self._layer, start, x[:, : boundary - start])
        return x

    def _encode(self, needed: int) -> None:
        """Encode what leaves the tail, and tell the next layer what has become of it."""
        plane = self._planes["value"]
        start = plane.boundary
        stop = start + self._leaving("value")
        if stop == start:
            return
        if self._differs:
            with torch.no_grad():
                before = self._into_basis("value", self.reconstruction.of(self._layer - 1, start, stop))
                plane.tail[:, :, : stop - start] -= before.unsqueeze(1)
        super()._encode(needed)
        with torch.no_grad():
            self._stored_inputs("value", start, plane.length)
