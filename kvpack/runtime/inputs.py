"""The compressed cache of one attention layer that stores its input, not its keys and values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvpack.core.errors import UnsupportedModel, UsageError
from kvpack.core.roles import Plane
from kvpack.core.types import State
from kvpack.models.rematerialise import Rematerialiser
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.runtime.layer import KVPackLayer
from kvpack.runtime.plane import PlaneCache
from kvpack.runtime.tokens import TokenTrack

CHECKED_TOKENS = 4
CHECK_TOLERANCE = 0.05
"""Largest difference between the model's keys and those made again, relative to the largest key."""


class InputsLayer(KVPackLayer):
    """A layer that stores X [B, T, C] and makes keys and values of old tokens again at every step.

    X is stored as it is, in one plane, or as X U in one or two bases U [C, r]; X U U^T has the same
    keys or values as X where U spans the rows of their projection. Protected tokens are exact keys
    and values, as in every layer. Source: XQuant, arXiv 2508.10395.

    Args:
        plan: a plan with `inputs`.
        states: state of each plane's codecs.
        bases: U of each plane that is stored in one.
        remake: makes keys and values.
        track: positions and padding, shared by the layers of a cache.
        exact_prefill: see `KVPackCache`.
    """

    def __init__(
        self,
        plan: KVLayerPlan,
        states: Mapping[str, tuple[State, ...]],
        bases: Mapping[Plane, Tensor],
        remake: Rematerialiser,
        track: TokenTrack,
        *,
        exact_prefill: bool = True,
    ) -> None:
        super().__init__(plan, states, None, track, exact_prefill=exact_prefill)
        self._bases, self._remake = bases, remake
        self._input: Tensor | None = None

    def see_input(self, x: Tensor) -> None:
        """Take what attention is given [B, T, C], before `update`."""
        self._input = x.detach()

    def _make_planes(self, key_states: Tensor, value_states: Tensor) -> dict[Plane, PlaneCache]:
        """Empty planes; the first update also shows whether keys can be made again at all."""
        self._check_remade(key_states, value_states)
        shapes = {name: self.plan.plane_shape(name, 0)[1:] for name in self.plan.planes}
        batch = key_states.shape[0]
        return {n: self._make_plane(n, key_states.new_empty((batch, *s))) for n, s in shapes.items()}

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        x = self._seen(key_states)
        with torch.no_grad():
            for name, plane in self._planes.items():
                plane.append(self._into_basis(name, x).unsqueeze(1))
        self._input = None

    def _seen(self, key_states: Tensor) -> Tensor:
        x = self._input
        if x is None or x.shape[:2] != (key_states.shape[0], key_states.shape[2]):
            raise UsageError(
                f"layer {self.plan.attention.layer}: the cache was not shown the attention's input",
                hint="run the model that kvpack.load returned",
            )
        return x

    def _into_basis(self, name: Plane, x: Tensor) -> Tensor:
        """What a plane stores of X [B, T, C]: [B, T, r]."""
        basis = self._bases.get(name)
        return x if basis is None else (x.float() @ basis.to(x.device).float()).to(x.dtype)

    def _stored_inputs(self, name: Plane, start: int, stop: int) -> Tensor:
        """X [B, stop - start, C] of the slots from `start` to the newest, `stop`, as a plane has it."""
        plane, basis = self._planes[name], self._bases.get(name)
        out = plane.tail.new_empty((plane.tail_shape[0], 1, stop - start, plane.tail_shape[3]))
        plane.read(out, start, self.track)
        x = out.squeeze(1)
        return x if basis is None else (x.float() @ basis.to(x.device).float().mT).to(x.dtype)

    def _read(self, start: int, past: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of slots `start` to `past` made again, then `new` ones as they are."""
        if new and past == 0:
            return new[0], new[1]
        with torch.no_grad():
            inputs = {name: self._stored_inputs(name, start, past) for name in self._planes}
            value = inputs["value"]
            keys, values = self._remade(inputs.get("key", value), value, start, past)
            self._overlay.write(keys, values, start)
        if new:
            return torch.cat((keys, new[0]), 2), torch.cat((values, new[1]), 2)
        return keys, values

    def _remade(self, key_input: Tensor, value_input: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        positions = self.track.positions_of(start, stop)
        if positions is None:
            raise UsageError(
                f"layer {self.plan.attention.layer}: the positions of cached tokens are not known",
                why="keys are made again at their positions",
                hint="pass position_ids [batch, tokens], or none at all",
            )
        return self._remake(key_input, value_input, positions)

    def _check_remade(self, key_states: Tensor, value_states: Tensor) -> None:
        """Compare the first tokens' keys and values with those made again from their input.

        Raises:
            UnsupportedModel: the model does more between input and cache than is known here.
        """
        past, tokens = self.track.past, min(CHECKED_TOKENS, key_states.shape[2])
        x = self._seen(key_states)[:, :tokens]
        with torch.no_grad():
            remade = self._remade(x, x, past, past + tokens)
        for name, given, made in zip(("keys", "values"), (key_states, value_states), remade, strict=True):
            first = given[:, :, :tokens].float()
            if (first - made.float()).abs().max() > CHECK_TOLERANCE * first.abs().max():
                raise UnsupportedModel(
                    f"the {name} of layer {self.plan.attention.layer} do not follow from its input",
                    where=self.plan.attention.module,
                    why="the model does more than to project, norm and rotate it",
                    hint="use a recipe that stores keys and values, such as kivi",
                )
