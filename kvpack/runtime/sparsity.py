"""Sparse activations at run time: modules that skip the weights which would meet zeros.

One token of one row is computed sparse for real: rows of matrices whose factor is zero are not read.
Several tokens of one row (a prompt) stay dense, or are masked where the plan says so. Rows of a
batch that come token by token keep different numbers each, so they are computed dense with a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvpack.core.errors import ArtifactError, UsageError
from kvpack.recipe.sparsity import THRESHOLD, Activity, SparseSite

SWITCH = "_kvpack_sparsity"
"""Attribute of a model that holds its `Switch`."""

Way = Literal["dense", "masked", "skipping"]


@dataclass
class Switch:
    """What all sparse modules of a model share: how several tokens are computed, and their `gates`."""

    prefill: Literal["dense", "masked"]
    gates: dict[str, Gate] = field(default_factory=dict)


class Gate:
    """Lets the large numbers of a token pass, and counts: `kept` of `seen`; dense passes do not count.

    The threshold, [C] or [1], is a buffer of `module`. `skips` tells what one token does not read.
    """

    def __init__(self, module: nn.Module, site: SparseSite, switch: Switch) -> None:
        spec = site.spec
        empty = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        module.register_buffer(THRESHOLD, empty)
        self._module, self.site, self._switch = module, site, switch
        self.skips = "nothing (masked)"
        self.reset()

    @property
    def threshold(self) -> Tensor:
        """From what magnitude on a number passes."""
        return self._module.get_buffer(THRESHOLD)

    def reset(self) -> None:
        """Forget what was counted."""
        self.kept = self.seen = 0

    def way(self, x: Tensor) -> Way:
        """How an input [..., T, C] is computed."""
        if x.numel() == x.shape[-1]:
            return "skipping"
        one_by_one = x.dim() > 2 and x.shape[-2] == 1
        return "masked" if one_by_one or self._switch.prefill == "masked" else "dense"

    def mask(self, x: Tensor) -> Tensor:
        """`x` without its small numbers."""
        passes = x.abs() >= self.threshold
        self.kept += int(torch.count_nonzero(passes))
        self.seen += x.numel()
        return torch.where(passes, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def choose(self, x: Tensor) -> Tensor:
        """Channels of one token `x` [C] that pass, int64 [n]."""
        passing = (x.abs() >= self.threshold).nonzero()[:, 0]
        self.kept += len(passing)
        self.seen += len(x)
        return passing

    def check(self, where: str) -> bool:
        """Whether the threshold, which has arrived, stops anything.

        Raises:
            ArtifactError: it is negative, infinite or NaN.
        """
        threshold = self.threshold
        if not bool((threshold.isfinite() & (threshold >= 0)).all()):
            raise ArtifactError(
                "threshold is negative or not finite",
                where=f"{where}.{THRESHOLD}",
                hint="export the artifact again",
            )
        return bool((threshold > 0).any())


def sparsity_of(model: Any) -> dict[str, Activity]:
    """What the sparse sites of a loaded model kept since they were counted last; by path of the module.

    Raises:
        UsageError: the model has no sparse activations.
    """
    return {
        name: Activity(
            gate.kept / gate.seen if gate.seen else None,
            gate.seen,
            gate.site.thresholds.keep_fraction,
            gate.site.active,
            gate.skips,
        )
        for name, gate in switch_of(model).gates.items()
    }


def count_anew(model: Any) -> None:
    """Set the counters of `sparsity_of` to zero."""
    for gate in switch_of(model).gates.values():
        gate.reset()


@contextmanager
def every_token_sparse(model: Any) -> Iterator[None]:
    """Mask every token, those of prompts too: what a model scores then is what it generates with.

    Nothing happens for a model without sparse activations.
    """
    switch = getattr(model, SWITCH, None)
    if switch is None:
        yield
        return
    before, switch.prefill = switch.prefill, "masked"
    try:
        yield
    finally:
        switch.prefill = before


def switch_of(model: Any) -> Switch:
    """What the sparse modules of a model share.

    Raises:
        UsageError: it has none.
    """
    switch: Switch | None = getattr(model, SWITCH, None)
    if switch is None:
        raise UsageError(
            f"this {type(model).__name__} has no sparse activations",
            hint="load an artifact whose recipe has a sparsity section",
        )
    return switch


def start_sparse(model: Any) -> None:
    """Weights and thresholds have arrived: check them, and lay matrices out for skipping.

    Raises:
        ArtifactError: a threshold is negative or not finite.
        UnsupportedModel: an FFN computes something else than an FFN of its kind.
    """
    for name, gate in switch_of(model).gates.items():
        stops, module = gate.check(name), model.get_submodule(name)
        if hasattr(module, "start"):
            module.start(stops)
        gate.reset()
