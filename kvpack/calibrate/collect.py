"""Collecting what parts ask for while a block runs: inputs of linear layers, keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvpack.calibrate.stats import Accumulator, accumulator
from kvpack.core.types import Site, Stat, State
from kvpack.recipe.plan import PlanePlan

if TYPE_CHECKING:
    from torch import Tensor, nn


class InputStats:
    """Statistics of the inputs of linear layers.

    Layers that are given the very same tensor (query, key and value projections) share their
    accumulators.
    """

    def __init__(self, wanted: Mapping[str, frozenset[Stat]]) -> None:
        self.wanted = {name: stats for name, stats in wanted.items() if stats}
        self._leader: dict[str, str] = {}
        self._found: dict[tuple[str, str], Accumulator] = {}
        self._inputs: list[tuple[Tensor, str]] = []
        self._updated: set[tuple[str, str]] = set()

    @contextmanager
    def attached(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch the layers while one batch runs."""
        self._inputs, self._updated = [], set()
        handles = [
            modules[name].register_forward_pre_hook(lambda m, args, name=name: self._see(name, args))
            for name in self.wanted
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._inputs = []

    def of(self, linear: str) -> dict[str, State]:
        """Finished statistics of a layer's input, by kind; empty when it wants none or never ran."""
        leader = self._leader.get(linear, "")
        kinds = sorted(s.kind for s in self.wanted.get(linear, ()))
        return {k: self._found[leader, k].state() for k in kinds if (leader, k) in self._found}

    def _see(self, name: str, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        leader = next((who for tensor, who in self._inputs if tensor is x), None)
        if leader is None:
            leader = name
            self._inputs.append((x, name))
        self._leader[name] = leader
        for stat in self.wanted[name]:
            key = (leader, stat.kind)
            if key not in self._updated:
                self._updated.add(key)
                found = self._found.setdefault(key, accumulator(stat.kind))
                found.update(x.reshape(1, 1, -1, x.shape[-1]))


class Chain:
    """The transforms and the codec of one plane of one layer, fitted one after another.

    A part's statistics are those of the tensor it would receive, so it can be measured only when
    all parts before it are fitted. Parts without statistics are fitted at once. Set `folded` when
    the transforms have become part of the weights: what is seen then has passed them already.
    """

    def __init__(self, plane: PlanePlan, at: Site) -> None:
        self.transforms, self._at = plane.transforms, at
        self._parts = plane.parts
        self.folded = False
        self.states: list[State] = []
        self._open: dict[str, Accumulator] = {}
        self._advance()

    @property
    def passes(self) -> int:
        """How many passes over the data are still needed."""
        return sum(bool(part.requires()) for part in self._parts[len(self.states) :])

    @property
    def transforms_fitted(self) -> bool:
        """Whether every transform has its state."""
        return len(self.states) >= len(self.transforms)

    def see(self, x: Tensor) -> None:
        """Measure keys or values [B, K, T, D] for the first part that is not fitted."""
        if not self._open:
            return
        for transform, state in () if self.folded else zip(self.transforms, self.states, strict=False):
            x = transform.forward(x, state, self._at)
        for found in self._open.values():
            found.update(x)

    def close(self) -> None:
        """The pass is over: fit what was measured, and what follows it without statistics."""
        if self._open:
            stats = {kind: found.state() for kind, found in self._open.items()}
            self.states.append(self._parts[len(self.states)].fit(stats))
            self._advance()

    def _advance(self) -> None:
        self._open = {}
        for part in self._parts[len(self.states) :]:
            if part.requires():
                self._open = {stat.kind: accumulator(stat.kind) for stat in part.requires()}
                return
            self.states.append(part.fit({}))
