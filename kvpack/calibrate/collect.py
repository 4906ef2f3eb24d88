"""Collecting what parts ask for while a block runs: inputs of linear layers, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvpack.calibrate.stats import Accumulator, accumulator
from kvpack.core.roles import Part
from kvpack.core.types import Site, Stat, State, Stream
from kvpack.recipe.plane_plan import PlanePlan

if TYPE_CHECKING:
    from torch import Tensor, nn

GIVEN: tuple[Stream, ...] = ("projection", "rope", "consumers")
"""What is known of a layer without a pass over the data."""


class _AllSeen(Exception):
    """Every layer has shown its input: what a batch would still compute, nobody looks at."""


class InputStats:
    """Statistics of the inputs of linear layers.

    Layers that are given the very same tensor (query, key and value projections) share their
    accumulators.

    Whoever throws the outputs of a pass away sets `stop`: from the second batch on a batch then ends
    as soon as every layer was seen, unless the first one has shown that a batch may call a layer
    twice, or not at all.
    """

    stop = False

    def __init__(self, wanted: Mapping[str, frozenset[Stat]]) -> None:
        self.wanted = {name: stats for name, stats in wanted.items() if stats}
        self._leader: dict[str, str] = {}
        self._found: dict[tuple[str, str], Accumulator] = {}
        self._inputs: list[tuple[Tensor, str]] = []
        self._updated: set[tuple[str, str]] = set()
        self._calls: list[str] = []
        self._latest: tuple[str, dict[str, State]] = ("", {})
        self._regular: bool | None = None

    @contextmanager
    def attached(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch the layers while one batch runs."""
        self._inputs, self._updated, self._calls, self._latest = [], set(), [], ("", {})
        handles = [
            modules[name].register_forward_pre_hook(lambda m, args, name=name: self._see(name, args))
            for name in self.wanted
        ]
        try:
            yield
            if self._regular is None:
                self._regular = sorted(self._calls) == sorted(self.wanted)
        except _AllSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
            self._inputs = []

    def of(self, linear: str) -> dict[str, State]:
        """Finished statistics of a layer's input, by kind; empty when it wants none or never ran.

        Those that were asked for last are at hand for other layers that are given the same tensor.
        """
        leader = self.leader(linear)
        if self._latest[0] != leader:
            self._latest = (leader, {})
        states, found = self._latest[1], self._found
        kinds = sorted(s.kind for s in self.wanted.get(linear, ()) if s.of == "input")
        for kind in kinds:
            if kind not in states and (leader, kind) in found:
                states[kind] = found[leader, kind].state()
        return {kind: states[kind] for kind in kinds if kind in states}

    def leader(self, linear: str) -> str:
        """The first of the layers that are given the same tensor; empty when this one never ran."""
        return self._leader.get(linear, "")

    def _see(self, name: str, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        leader = next((who for tensor, who in self._inputs if tensor is x), None)
        if leader is None:
            leader = name
            self._inputs.append((x, name))
        self._leader[name] = leader
        for stat in (s for s in self.wanted[name] if s.of == "input"):
            key = (leader, stat.kind)
            if key not in self._updated:
                self._updated.add(key)
                self._take(leader, stat.kind, x)
        self._calls.append(name)
        if self.stop and self._regular and len(self._calls) == len(self.wanted):
            raise _AllSeen

    def add(self, names: Sequence[str], x: Tensor) -> None:
        """Take in the tensor [..., C] that a batch gives to all of some layers."""
        self._leader.update(dict.fromkeys(names, names[0]))
        for kind in sorted({s.kind for name in names for s in self.wanted[name] if s.of == "input"}):
            self._take(names[0], kind, x)

    def _take(self, leader: str, kind: str, x: Tensor) -> None:
        found = self._found.setdefault((leader, kind), accumulator(kind))
        found.update(x.detach().reshape(1, 1, -1, x.shape[-1]))


class Chain:
    """The transforms and the codecs of one plane of one layer, fitted one after another.

    A part's statistics are those of the tensor it would receive, so it can be measured only when
    all parts before it are fitted. Parts without statistics are fitted at once, and so are those
    that only look at what is given. Codecs of several tiers receive the same tensor. Set `folded`
    when the transforms have become part of the weights: what is seen then has passed them already.

    Args:
        plane: the parts.
        at: layer, rotary embedding and positions of the tokens that will be seen.
        given: statistics that need no data, for the streams that have such, see `Stat`.
    """

    def __init__(self, plane: PlanePlan, at: Site, given: Callable[[Stream], State] | None = None) -> None:
        self.transforms, self._at, self._source = plane.transforms, at, given
        self._parts = plane.parts
        self.folded = False
        self.states: list[State] = []
        self._open: dict[Stat, Accumulator] = {}
        self._advance()

    @property
    def passes(self) -> int:
        """How many passes over the data are still needed."""
        return sum(bool(_measured(part)) for part in self._parts[len(self.states) :])

    @property
    def transforms_fitted(self) -> bool:
        """Whether every transform has its state."""
        return len(self.states) >= len(self.transforms)

    def wants(self, stream: Stream) -> bool:
        """Whether the part that is measured now looks at gradients or queries."""
        return any(stat.of == stream for stat in self._open)

    def see(self, x: Tensor, gradient: Tensor | None = None) -> None:
        """Measure keys or values [B, K, T, D], and gradients of the loss with respect to them."""
        if self.wants("input"):
            self._update("input", self._through(x, "input"))
        if gradient is not None and self.wants("gradient"):
            self._update("gradient", self._through(gradient, "gradient"))

    def see_queries(self, query: Tensor) -> None:
        """Measure the queries [B, H, T, D] that read this plane."""
        if not self.wants("query"):
            return
        batch, _, tokens, channels = query.shape
        grouped = query.reshape(batch, self._at.kv_heads, -1, tokens, channels)
        # One query head of every kv head at a time, so that positions fit the tokens.
        heads = [self._through(grouped[:, :, g], "query") for g in range(grouped.shape[2])]
        self._update("query", torch.cat(heads, 2))

    def _through(self, x: Tensor, stream: Stream) -> Tensor:
        """Bring keys or values, gradients or queries to the basis of the part that is measured."""
        # Gradients are those of the original model, whether or not values come folded.
        passed = self.folded and stream != "gradient"
        for transform, state in () if passed else zip(self.transforms, self.states, strict=False):
            sides = {"input": transform.forward, "gradient": transform.gradient, "query": transform.query}
            x = sides[stream](x, state, replace(self._at, kv_heads=x.shape[1]))
        return x

    def _update(self, stream: Stream, x: Tensor) -> None:
        for stat, found in self._open.items():
            if stat.of == stream:
                found.update(x)

    def close(self, *, whole: bool = True) -> None:
        """The pass is over: fit what was measured, and what follows it without statistics.

        After a pass that was broken off (not `whole`) the same is measured again, from the start.
        """
        if self._open and not whole:
            self._advance()
        elif self._open:
            part = self._parts[len(self.states)]
            stats = {stat.name: found.state() for stat, found in self._open.items()}
            self.states.append(part.fit({**stats, **self._given(part)}))
            self._advance()

    def _given(self, part: Part) -> dict[str, State]:
        """Statistics that need no data."""
        wanted = [stat for stat in part.requires() if stat.of in GIVEN]
        return {stat.name: self._source(stat.of) for stat in wanted} if self._source else {}

    def _advance(self) -> None:
        self._open = {}
        for part in self._parts[len(self.states) :]:
            if wanted := _measured(part):
                self._open = {stat: accumulator(stat.kind) for stat in wanted}
                return
            self.states.append(part.fit(self._given(part)))


def _measured(part: Part) -> list[Stat]:
    """Statistics of a part that need a pass over the data."""
    return sorted((s for s in part.requires() if s.of not in GIVEN), key=lambda s: s.name)
