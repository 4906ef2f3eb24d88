"""Experts that hardly any token is routed to.

An expert is calibrated by the tokens that the router sends to it. Where those are fewer than
`FEWEST_TOKENS`, statistics would be noise, or missing; such a cold expert runs on every token of its
layer while the block is measured. So its middle layer, too, has statistics of its own channels,
which another expert's could not replace. How many tokens each expert had is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from kvpack.folding import learned
from kvpack.models.experts import Experts
from kvpack.models.view import ModelView
from kvpack.recipe.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

FEWEST_TOKENS = 256
"""Routed tokens below which an expert is cold."""


def find_cold(plan: Plan, layer: int, view: ModelView, run: Callable[[], None]) -> dict[str, int]:
    """Count the tokens of a block's experts, and show every token to the cold ones from now on.

    Args:
        plan: says what is measured; a block in whose experts nothing is does not run.
        layer: which block; it is loaded.
        view: holds it.
        run: runs all samples through it.

    Returns:
        Tokens that were routed to each expert, by the expert's path; empty without experts.
    """
    name, measured = plan.model.blocks[layer], list(_measured(plan, layer))
    found = {f"{name}.{path}": module for path, module in _experts(view.blocks[layer])}
    found = {path: m for path, m in found.items() if any(n.startswith(f"{path}.") for n in measured)}
    counts = {path: torch.zeros(len(module), dtype=torch.int64) for path, module in found.items()}
    with ExitStack() as stack:
        for path, module in found.items():
            hook = module.register_forward_pre_hook(_counter(counts[path]))
            stack.callback(hook.remove)
        if found:
            run()
    for path, module in found.items():
        module.shown_all = frozenset((counts[path] < FEWEST_TOKENS).nonzero().flatten().tolist())
    return {f"{path}.{i}": int(n) for path, count in counts.items() for i, n in enumerate(count)}


def release(view: ModelView, layer: int) -> None:
    """Let the experts of a block run on nothing but what is routed to them again."""
    for _, module in _experts(view.blocks[layer]):
        module.shown_all = frozenset()


def inside(view: ModelView, layer: int) -> tuple[str, ...]:
    """What the paths of everything inside a block's experts begin with."""
    name = view.spec.blocks[layer]
    return tuple(f"{name}.{path}." for path, _ in _experts(view.blocks[layer]))


def summary(tokens: Mapping[str, int]) -> dict[str, Any]:
    """What calibrations and artifacts tell of experts: cold ones with their tokens, and all tokens."""
    cold = {expert: count for expert, count in tokens.items() if count < FEWEST_TOKENS}
    return {"measured": len(tokens), "fewest_tokens": FEWEST_TOKENS, "cold": cold, "tokens": dict(tokens)}


def _experts(block: nn.Module) -> Iterator[tuple[str, Experts]]:
    return ((path, m) for path, m in block.named_modules() if isinstance(m, Experts))


def _measured(plan: Plan, layer: int) -> Iterator[str]:
    """Names of what learns from data in a block: linear layers, changes of basis, sparse sites."""
    weights = plan.weights.items()
    yield from (n for n, w in weights if w.linear.layer == layer and w.solver.requires())
    yield from (c.place.name for c in plan.basis if c.layer == layer and learned(c))
    yield from () if plan.sparsity is None else plan.sparsity.of_layer(layer)


def _counter(counts: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds to `counts` [E] how often each expert is chosen; empty slots do not count."""

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        experts = len(counts)
        counts.add_(torch.bincount(args[1].flatten(), minlength=experts)[:experts].cpu())

    return count
