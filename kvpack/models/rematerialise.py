"""Keys and values made again from the input of their projections, by the model's own modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvpack.core.errors import UnsupportedModel
from kvpack.core.model_spec import AttentionSpec, Projection
from kvpack.core.types import Rope
from kvpack.models.families import KEY_NORMS
from kvpack.models.rope import rope_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rematerialiser:
    """K = RoPE(norm(X W_k + b_k)) and V = X W_v + b_v of one attention layer, X = before(input).

    The model's own modules are called, so that packed weights, biases, norms and rotations are
    those that new tokens get. Source: XQuant, arXiv 2508.10395.

    Attributes:
        attention: where the heads are in the projections' rows.
        key: the key projection, or the fused one.
        value: the value projection; the same module where it is fused.
        norm: what stands between key projection and RoPE, None for nothing.
        rope: the layer's rotary embedding.
        before: the decoder layer's norm, where inputs are taken before it; None for nothing.
    """

    attention: AttentionSpec
    key: nn.Module
    value: nn.Module
    norm: Callable[[Tensor], Tensor] | None
    rope: Rope
    before: nn.Module | None = None

    @classmethod
    def of(cls, model: nn.Module, attention: AttentionSpec, *, residual: bool = False) -> Rematerialiser:
        """Take the modules of one layer of `model`; `residual` for inputs from before its norm.

        Raises:
            UnsupportedModel: the model's RoPE cannot be applied from outside, or the layer's norm
                has another name than input_layernorm.
        """
        module = model.get_submodule(attention.module)
        key, value = (model.get_submodule(p.linear) for p in (attention.key, attention.value))
        before = _input_norm(model, attention) if residual else None
        return cls(attention, key, value, _key_norm(module), rope_of(model, module), before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rematerialiser:
        """Itself: a copied cache belongs to the same model."""
        return self

    def __call__(self, key_input: Tensor, value_input: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, T, D], as the model gives them to its cache.

        Args:
            key_input: X [B, T, C], from which keys are made.
            value_input: the same for values; may be the same tensor.
            positions: [B or 1, T].
        """
        same = value_input is key_input
        if self.before is not None:
            key_input = self.before(key_input)
            value_input = key_input if same else self.before(value_input)
        made = self.key(key_input)
        shared = same and self.value is self.key
        values = _heads(made if shared else self.value(value_input), self.attention.value)
        keys = self._normed(_heads(made, self.attention.key))
        return self.rope.apply(keys.transpose(1, 2), positions), values.transpose(1, 2)

    def _normed(self, keys: Tensor) -> Tensor:
        """`keys` [B, T, K, D] behind the norm, which works per head or on all heads at once."""
        if self.norm is None:
            return keys
        weight = getattr(self.norm, "weight", None)
        flat = isinstance(weight, torch.Tensor) and weight.shape == (keys.shape[2] * keys.shape[3],)
        return self.norm(keys.flatten(2)).view_as(keys) if flat else self.norm(keys)


def _key_norm(attention: nn.Module) -> Callable[[Tensor], Tensor] | None:
    found = (getattr(attention, name, None) for name in KEY_NORMS)
    return next((norm for norm in found if isinstance(norm, nn.Module)), None)


def _input_norm(model: nn.Module, attention: AttentionSpec) -> nn.Module:
    norm = getattr(model.get_submodule(attention.block), "input_layernorm", None)
    if not isinstance(norm, nn.Module):
        raise UnsupportedModel(
            "the decoder layer has no input_layernorm",
            where=attention.block,
            why="inputs from before the norm would have to pass it again",
            hint="set kv_cache.inputs.tap=post_norm",
        )
    return norm


def _heads(rows: Tensor, projection: Projection) -> Tensor:
    """The heads of a projection's output [B, T, R] as [B, T, K, D]."""
    return torch.stack([rows[..., start:stop] for start, stop in projection.heads], 2)
