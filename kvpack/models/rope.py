"""Rotary position embedding as the model itself applies it, and its inverse.

The model family's own rotary module and rotation function are called, so that partial rotation,
interleaved pairs and scaled frequencies need no code here.

Inverting: RoPE maps a pair (a, b) by the matrix [[c, -s], [s, c]], whose inverse is its transpose
divided by c^2 + s^2. So undoing is applying with cos / (c^2 + s^2) and -sin / (c^2 + s^2). The
divisor is 1 up to the rounding of cos and sin, and the squared attention factor under YaRN.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvpack.core.errors import UnsupportedModel
from kvpack.core.types import Rope
from kvpack.models.families import has_rope

if TYPE_CHECKING:
    from torch import Tensor

_FUNCTION = "apply_rotary_pos_emb"
_LENGTH_DEPENDENT = {"dynamic", "longrope"}

Rotation = Callable[..., "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class ModelRope:
    """RoPE of one layer, through the model's own functions.

    Attributes:
        rotate: the family's ``apply_rotary_pos_emb(q, k, cos, sin)``.
        embed: positions [B, T] -> cos and sin [B, T, D'], rounded as the model rounds them.
        channels: how many of the first channels `rotate` takes, where the family's attention
            splits them off itself; None where `rotate` takes whole heads.
    """

    rotate: Rotation
    embed: Callable[[Tensor], tuple[Tensor, Tensor]]
    channels: int | None = None

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` [B, K, T, D] to `positions` [B or 1, T], in the dtype of `x`."""
        cos, sin = self.embed(positions)
        return self._rotate(x, cos.to(x.dtype), sin.to(x.dtype))

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Invert `apply`, in float32."""
        cos, sin = (t.float() for t in self.embed(positions))
        square = cos * cos + sin * sin
        return self._rotate(x.float(), cos / square, -sin / square)

    def partners(self, channels: int) -> Tensor:
        """The channel that each of `channels` is turned with.

        A quarter turn of every pair (cos 0, sin 1) sends the unit vector of a channel to its partner's.
        """
        cos, sin = self.embed(torch.zeros(1, 1, dtype=torch.long))
        units = torch.eye(channels)[:, None, None]
        turned = self._rotate(units, torch.zeros_like(cos.float()), torch.ones_like(sin.float()))
        return turned.abs().flatten(1).argmax(1)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Queries are rotated along with keys; a single empty head costs nothing.
        turning = x[..., : self.channels]
        turned = self.rotate(turning[:, :0], turning, cos, sin)[1]
        return turned if self.channels is None else torch.cat((turned, x[..., self.channels :]), -1)


@dataclass(frozen=True)
class _Embedding:
    """Positions to cos and sin; equal for layers that share them."""

    rotary: nn.Module
    dtype: torch.dtype
    layer_type: str | None

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=self.dtype, device=positions.device)
        extra = {"layer_type": self.layer_type} if self.layer_type else {}
        cos, sin = self.rotary(like, positions, **extra)
        return cos, sin


@dataclass(frozen=True)
class NoRope:
    """A layer whose keys carry no position."""

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` as it is."""
        return x

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` in float32."""
        return x.float()

    def partners(self, channels: int) -> Tensor:
        """Every channel for itself."""
        return torch.arange(channels)


def rope_of(model: nn.Module, attention: nn.Module, *, fixed: bool = True) -> Rope:
    """The RoPE of one attention module of `model`.

    Args:
        model: holds the rotary module.
        attention: the layer.
        fixed: whether keys will be un-rotated, which needs frequencies that stay.

    Raises:
        UnsupportedModel: no rotary module or several, a foreign rotation function, or, where
            `fixed`, frequencies that change with the length of the text.
    """
    where = type(attention).__name__
    rotate = getattr(sys.modules[type(attention).__module__], _FUNCTION, None)
    if rotate is None or list(inspect.signature(rotate).parameters)[:4] != ["q", "k", "cos", "sin"]:
        raise UnsupportedModel(
            f"its module has no {_FUNCTION}(q, k, cos, sin)", where=where, why="un-RoPE needs the rotation"
        )
    if not has_rope(attention):
        return NoRope()
    rotary = _rotary_module(model, attention)
    layer_type = _layer_type(rotary, attention)
    if fixed:
        _check_fixed(rotary, layer_type, where)
    # The model rounds cos and sin to its own dtype, whatever dtype a block is held in.
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    embed = _Embedding(rotary, dtype, layer_type)
    return ModelRope(rotate, embed, getattr(attention, "rotary_ndims", None))


def _rotary_module(model: nn.Module, attention: nn.Module) -> nn.Module:
    for root in (attention, model):
        found = [m for m in root.modules() if type(m).__name__.endswith("RotaryEmbedding")]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise UnsupportedModel(
        f"{type(model).__name__} has {len(found)} rotary modules, expected one",
        why="which one a layer uses cannot be told",
    )


def _layer_type(rotary: nn.Module, attention: nn.Module) -> str | None:
    """The layer type that the rotary module wants to be told, None when it has one RoPE for all."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return None
    layer_type: Any = getattr(attention, "layer_type", None)
    if layer_type is None:
        config: Any = attention.config
        layer_type = config.layer_types[attention.layer_idx]
    return str(layer_type)


def _check_fixed(rotary: nn.Module, layer_type: str | None, where: str) -> None:
    kind: Any = getattr(rotary, "rope_type", "default")
    kind = kind.get(layer_type) if isinstance(kind, dict) else kind
    if kind in _LENGTH_DEPENDENT:
        raise UnsupportedModel(
            f"RoPE of type {kind!r} cannot be undone",
            where=where,
            why="its frequencies change with the length of the text",
            hint="use a recipe that compresses keys after RoPE",
        )
