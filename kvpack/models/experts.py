"""Mixture-of-experts layers whose experts are linear layers of their own.

transformers keeps the experts of a layer fused in two 3-D parameters, gate_up_proj [E, 2 I, C] and
down_proj [E, C, I] (E experts, I wide inside). kvpack takes them apart on the skeleton, so that each
projection of each expert is a linear layer: it has a name, is calibrated by the tokens that are
routed to it, is packed like any other, and is decoded only when a token needs it. The router stays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_FUSED = {"gate_up_proj", "down_proj"}
_PLAIN_GATE = "transformers.integrations.moe"
"""Where the gating lives that a class of experts has unless it defines its own."""


class _Projection(nn.Linear):
    """A linear layer without bias, in the dtype and on the device of `like`, whose weight is not set."""

    def __init__(self, channels: int, rows: int, like: Tensor) -> None:
        super().__init__(channels, rows, bias=False, device=like.device, dtype=like.dtype)
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draw no numbers: of thousands of experts that would take most of the time of a plan."""


class Expert(nn.Module):
    """``y = down(act(gate(x)) * up(x))`` for x [N, C]: one expert."""

    def __init__(self, channels: int, width: int, act: Callable[[Tensor], Tensor], like: Tensor) -> None:
        super().__init__()
        self.gate_proj = _Projection(channels, width, like)
        self.up_proj = _Projection(channels, width, like)
        self.down_proj = _Projection(width, channels, like)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        """Apply the expert to tokens [N, C]."""
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return result


class Experts(nn.ModuleList):
    """The experts of one layer; those that no token is routed to do not run.

    Experts in `shown_all` run on every token, so that calibration can watch them; what they give
    counts only where they were chosen.
    """

    shown_all: frozenset[int] = frozenset()

    @classmethod
    def apart(cls, fused: nn.Module) -> Experts:
        """Experts of the shapes, dtype and device of a fused module; their weights are not set."""
        like = fused.get_parameter("down_proj")
        count, channels, width = like.shape
        act = fused.get_submodule("act_fn")
        return cls(Expert(channels, width, act, like) for _ in range(count))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted.

        Args:
            hidden_states: tokens [T, C].
            top_k_index: experts per token [T, K]; a number that is no expert's is an empty slot.
            top_k_weights: their weights [T, K].
        """
        result = torch.zeros_like(hidden_states)
        counts = torch.bincount(top_k_index.flatten(), minlength=len(self))[: len(self)]
        for index in sorted({*counts.nonzero().flatten().tolist(), *self.shown_all}):
            tokens, slots = (top_k_index == index).nonzero(as_tuple=True)
            if index in self.shown_all:
                # A tensor object of its own: experts do not become readers of one shared input.
                found = self[index](hidden_states[:])[tokens]
            else:
                found = self[index](hidden_states[tokens])
            part = found * top_k_weights[tokens, slots, None]
            result.index_add_(0, tokens, part.to(result.dtype))
        return result


def take_apart(model: nn.Module) -> None:
    """Replace every fused module of experts that is computed in the usual way; others stay."""
    fused = [name for name, module in model.named_modules() if _is_fused(module)]
    for name in fused:
        model.set_submodule(name, Experts.apart(model.get_submodule(name)))


def _is_fused(module: nn.Module) -> bool:
    """Whether these are [gate; up] and down projections without biases, gated by an activation alone."""
    layout = [getattr(module, name, None) for name in ("is_concatenated", "is_transposed", "has_bias")]
    usual = getattr(getattr(type(module), "_apply_gate", None), "__module__", "") == _PLAIN_GATE
    return (
        usual
        and layout == [True, False, False]
        and not getattr(module, "has_post_expert_norm", False)
        and {name for name, _ in module.named_parameters()} == _FUSED
        and isinstance(getattr(module, "act_fn", None), nn.Module)
    )
