"""What an FFN is made of, found by structure: an activation between linear layers of known names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from kvpack.core.errors import UnsupportedModel
from kvpack.models.families import ROLES

if TYPE_CHECKING:
    from torch import Tensor

_ACTIVATIONS = ("act_fn", "activation_fn", "act")


@dataclass(frozen=True)
class FeedForward:
    """``down(a * u)``, where a [..., I] is the activated gate and u what the up projection gives.

    `first` makes what the activation is given; where it is `fused` it makes that and u, one behind
    the other. `up` is None there, and where nothing is multiplied with a.
    """

    activation: nn.Module
    first: nn.Module
    up: nn.Module | None
    down: nn.Module
    fused: bool

    @classmethod
    def of(cls, module: nn.Module, where: str) -> FeedForward:
        """Take an FFN apart.

        Raises:
            UnsupportedModel: it has other layers, or its activation is no module.
        """
        by_role = {ROLES.get(name, ""): child for name, child in module.named_children()}
        activation = next((getattr(module, n) for n in _ACTIVATIONS if hasattr(module, n)), None)
        first = next((by_role[r] for r in ("gate", "gate_up", "up") if r in by_role), None)
        known = by_role.keys() & {"gate", "up", "gate_up", "down"}
        gated = {"gate", "up", "down"}
        if known not in (gated, {"gate_up", "down"}, {"up", "down"}) or first is None:
            raise UnsupportedModel(
                f"{type(module).__name__} is no FFN that kvpack knows", where=where, why=_HINT_LAYERS
            )
        if not isinstance(activation, nn.Module):
            raise UnsupportedModel(
                f"the activation of {type(module).__name__} is not found", where=where, why=_HINT_ACTIVATION
            )
        up = by_role["up"] if known == gated else None
        return cls(activation, first, up, by_role["down"], "gate_up" in known)

    @property
    def gated(self) -> bool:
        """Whether the activation is multiplied with something."""
        return self.fused or self.up is not None

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The activated gate, and what it is multiplied with, None without a gate; [..., I] each."""
        if self.fused:
            gate, factor = self.first(x).chunk(2, dim=-1)
            return self.activation(gate), factor
        gate = self.activation(self.first(x))
        return gate, None if self.up is None else self.up(x)


_HINT_LAYERS = "sparsity needs gate, up and down projections, a fused gate and up projection, or up and down"
_HINT_ACTIVATION = f"it is none of the modules {', '.join(_ACTIVATIONS)}"
