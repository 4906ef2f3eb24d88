"""Schemes that store inputs, and the same done to a plain model by hooks, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpack import ops
from kvpack.core.roles import Codec, TierPolicy
from kvpack.core.types import Group, TensorSpec
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.recipe.inputs_plan import InputsPlan, basis_name
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.runtime.install import install
from tests.runtime.schemes import attention_of, fake_quantise

GROUP = 8
EMPTY = PlanePlan((), False, (), ())


def per_token(bits: int) -> Affine:
    return Affine(bits=bits, group=Group("channel", GROUP), scale_dtype="float32")


def per_channel(bits: int) -> Affine:
    return Affine(bits=bits, group=Group("token", GROUP), scale_dtype="float32")


def projections(model: Any, spec: Any) -> tuple[Tensor, Tensor]:
    """The rows of W_k and W_v, heads one after another."""
    sides = (spec.key, spec.value)
    weights = [model.get_submodule(side.linear).weight.detach() for side in sides]
    key, value = (torch.cat([w[a:b] for a, b in s.heads]) for w, s in zip(weights, sides, strict=True))
    return key, value


@dataclass(frozen=True)
class InputScheme:
    """What the layers of a model get; `base_layers` > 0 makes differences of the others."""

    svd: bool = False
    key: Codec = field(default_factory=Identity)
    value: Codec = field(default_factory=Identity)
    base: Codec = field(default_factory=Identity)
    base_layers: int = 0
    residual: bool = False
    policy: TierPolicy = field(default_factory=lambda: SinkRecent(recent_tokens=0))

    def bases(self, model: Any, spec: Any) -> dict[str, Tensor]:
        if not self.svd:
            return {}
        key, value = projections(model, spec)
        if self.base_layers:
            return {"value": ops.singular.input_basis(torch.cat((key, value)))}
        return {"key": ops.singular.input_basis(key), "value": ops.singular.input_basis(value)}

    def plans(self, model: Any) -> list[KVLayerPlan]:
        return [self.plan(model, spec) for spec in attention_of(model)]

    def plan(self, model: Any, spec: Any) -> KVLayerPlan:
        bases = {n: TensorSpec(tuple(u.shape), "float32") for n, u in self.bases(model, spec).items()}
        link = None
        if self.base_layers:
            link = "base" if spec.layer < self.base_layers else "difference"
        channels = model.get_submodule(spec.key.linear).in_features
        inputs = InputsPlan(channels, bases, link, "residual" if self.residual else "post_norm")
        value = PlanePlan((), False, (self.base if link == "base" else self.value,), ({},))
        key = PlanePlan((), False, (self.key,), ({},)) if "key" in inputs.planes else EMPTY
        return KVLayerPlan(spec, key, value, self.policy, inputs)

    def install(self, model: Any) -> Any:
        states = {
            basis_name(spec.layer, name): basis
            for spec in attention_of(model)
            for name, basis in self.bases(model, spec).items()
        }
        install(model, self.plans(model), states)
        return model


def tokens_quantised(x: Tensor, bits: int) -> Tensor:
    """Every token in groups of channels, float64."""
    return torch.cat([fake_quantise(part, bits, -1) for part in x.split(GROUP, -1)], -1)


def channels_quantised(x: Tensor, bits: int) -> Tensor:
    """Every channel in groups of tokens [B, T, C], float64; tokens that fill no group are exact."""
    whole = x.shape[1] // GROUP * GROUP
    parts = [fake_quantise(part, bits, 1) for part in x[:, :whole].split(GROUP, 1)]
    return torch.cat((*parts, x[:, whole:]), 1)


Change = Callable[[int, str, Tensor], Tensor]
"""(layer, "k" or "v", X [B, T, C] float64) -> X as it is stored."""


def change_inputs(model: Any, change: Change) -> Any:
    """Let the key and value projections of a plain model see changed inputs; queries see the exact ones."""

    def hook(layer: int, side: str) -> Callable[..., Any]:
        return lambda module, args: (change(layer, side, args[0].double()).to(args[0].dtype),)

    for spec in attention_of(model):
        for side, projection in (("k", spec.key), ("v", spec.value)):
            model.get_submodule(projection.linear).register_forward_pre_hook(hook(spec.layer, side))
    return model


def plain_change(bits: int) -> Change:
    return lambda layer, side, x: tokens_quantised(x, bits)


def svd_change(model: Any, bits: int) -> Change:
    """Y_k = X U_k per channel, Y_v = X U_v per token, through a float64 SVD of the weights."""

    def basis(weight: Tensor) -> Tensor:
        return torch.linalg.svd(weight.T.double(), full_matrices=False).U

    bases = [
        {s: basis(w) for s, w in zip("kv", projections(model, a), strict=True)} for a in attention_of(model)
    ]

    def change(layer: int, side: str, x: Tensor) -> Tensor:
        u = bases[layer][side]
        # The sign of a direction decides which end of its range is the minimum: rounding may differ.
        u = u * torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
        coded = channels_quantised(x @ u, bits) if side == "k" else tokens_quantised(x @ u, bits)
        return coded @ u.T

    return change


def chained_change(bits: int, base_bits: int, base_layers: int, *, closed: bool = True) -> Change:
    """X^_i = X^_{i-1} + Q(X_i - R_{i-1}): R is the reconstruction, or the exact input where open."""
    made: dict[int, Tensor] = {}
    exact: dict[int, Tensor] = {}

    def change(layer: int, side: str, x: Tensor) -> Tensor:
        if side == "k":
            exact[layer] = x
            if layer < base_layers:
                made[layer] = tokens_quantised(x, base_bits)
            else:
                reference = made[layer - 1] if closed else exact[layer - 1]
                made[layer] = made[layer - 1] + tokens_quantised(x - reference, bits)
        return made[layer]

    return change
