"""Keys and values of a decode step: where each stretch of slots lies, and how it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpack import kernels
from kvpack.core.roles import Codec
from kvpack.core.rows import Step, TokenRows, Turn
from kvpack.core.types import Payload
from kvpack.runtime.plane import PlaneCache
from kvpack.runtime.tier import Tier
from kvpack.runtime.tokens import TokenTrack


def pieces(start: int, stop: int, edges: frozenset[int]) -> Iterator[tuple[int, int]]:
    """Stretches of slots that cross no edge."""
    return pairwise(sorted({start, stop} | {edge for edge in edges if start < edge < stop}))


class Coded(NamedTuple):
    """Codes of some slots, behind `before` others that are in the same payload."""

    codec: Codec
    payload: Payload
    before: int


class _Side:
    """Keys or values of a step: which stretch of slots lies where."""

    def __init__(self, plane: PlaneCache, track: TokenTrack) -> None:
        self.plane, self.track = plane, track
        self.edges = frozenset(self._edges())
        """Slots at which tiers, runs of blocks and the tail begin."""

    def _edges(self) -> Iterator[int]:
        slot = self.plane.boundary - self.plane.stored_tokens
        for tier in reversed(self.plane.tiers):
            for length in tier.store.lengths():
                yield slot
                slot += length
        yield self.plane.tail_start

    def tier_of(self, slot: int) -> tuple[Tier, int] | None:
        """The tier that holds a slot, and how many of its tokens are older; None for the tail."""
        if slot >= self.plane.boundary:
            return None
        first = self.plane.boundary - self.plane.stored_tokens
        for tier in reversed(self.plane.tiers):
            if slot < first + tier.tokens:
                return tier, slot - first
            first += tier.tokens
        return None

    def coded(self, start: int, stop: int) -> Coded | None:
        """Slots as they are stored; None for the tail."""
        found = self.tier_of(start)
        if found is None:
            return None
        payload, before = found[0].stored(found[1], stop - start)
        return Coded(found[0].codec, payload, before)

    def exact(self, start: int, stop: int) -> Tensor:
        """Slots of the tail, float32 [B, K, t, D]."""
        tail = self.plane.tail[:, :, start - self.plane.tail_start : stop - self.plane.tail_start]
        return tail.float()

    def rows(self, tier: Tier, skip: int, start: int, stop: int) -> tuple[TokenRows, int, int]:
        """Coded slots for loops that transform them back row by row; others before and behind them."""
        found, before, behind = tier.rows(skip, stop - start)
        steps: list[Step] = []
        heads = self.plane.tail_shape[1] // self.plane.coded_shape[1]
        for step in self._steps(start, stop):
            if isinstance(step, Turn) and before + behind:
                own, other = (pad(t, (0, 0, before, behind)) for t in (step.own, step.other))
                steps.append(Turn(own, other, step.partner))
            else:
                steps.append(step)
        return found._replace(steps=tuple(steps), heads=heads), before, behind

    def _steps(self, start: int, stop: int) -> Iterator[Step]:
        """How rows come back to the model's basis; what depends on positions is shared by all layers."""
        shape: tuple[int, ...] = self.plane.tail_shape
        found = []
        for transform, state, site in self.plane.row_transforms:
            if transform.needs_rope:
                known, key = self.track.turns, (transform, site.rope, shape[3], start, stop)
                if key not in known:
                    at = replace(site, positions=self.track.positions_of(start, stop))
                    known[key] = transform.row_steps(state, at, shape[3])
                found.append(known[key])
            else:
                found.append(transform.row_steps(state, site, shape[3]))
            shape = transform.shape(shape)
        return (step for steps in reversed(found) for step in steps)

    def decoded(self, tier: Tier, skip: int, start: int, stop: int) -> Tensor:
        """Coded slots in the model's basis, float32 [B, K, t, D]."""
        x = tier.decode(skip, stop - start)
        positions = self.track.positions_of(start, stop)
        for transform, state, site in reversed(self.plane.transforms):
            x = transform.inverse(x, state, replace(site, positions=positions))
        return x


class Keys(_Side):
    """Scores of queries [B, K, M, D], which are scaled already."""

    def __init__(self, plane: PlaneCache, track: TokenTrack, query: Tensor) -> None:
        super().__init__(plane, track)
        self.query = query
        self.dual = self._dual()

    def _dual(self) -> Tensor | None:
        """The queries in the basis of the codes, None where there is no such thing."""
        if not self.plane.keeps_heads:
            return None
        query: Tensor | None = self.query
        for transform, state, site in self.plane.transforms:
            query = None if query is None else transform.dual(query, state, site)
        return query

    def scores(self, start: int, stop: int) -> Tensor:
        """[B, K, M, stop - start]."""
        found = [self._scores(*piece) for piece in pieces(start, stop, self.edges)]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _scores(self, start: int, stop: int) -> Tensor:
        """The same of slots that cross no edge."""
        found = self.tier_of(start)
        if found is None:
            return self.query @ self.exact(start, stop).mT
        tier, skip = found
        if self.dual is None and self.plane.in_rows:
            rows, before, _ = self.rows(tier, skip, start, stop)
            return kernels.rows.scores(self.query, rows)[..., before : before + stop - start]
        if self.dual is None:
            return self.query @ self.decoded(tier, skip, start, stop).mT
        return tier.scores(self.dual, skip, stop - start)


class Values(_Side):
    """Sums of values with weights [B, K, M, t], in the basis of the codes where that is possible."""

    def __init__(self, plane: PlaneCache, track: TokenTrack) -> None:
        super().__init__(plane, track)
        self.on_codes = plane.keeps_heads and all(t.linear for t, _, _ in plane.transforms)

    def mix(self, weights: Tensor, start: int, stop: int) -> dict[bool, Tensor]:
        """[B, K, M, D] by whether it is still in the basis of the codes."""
        sums: dict[bool, Tensor] = {}
        for first, last in pieces(start, stop, self.edges):
            found, coded = self._mix(weights[..., first - start : last - start], first, last)
            sums[coded] = sums[coded] + found if coded in sums else found
        return sums

    def _mix(self, weights: Tensor, start: int, stop: int) -> tuple[Tensor, bool]:
        """Sums of slots that cross no edge, and whether they are still in the basis of the codes."""
        found = self.tier_of(start)
        if found is None:
            return weights @ self.exact(start, stop), False
        tier, skip = found
        if not self.on_codes and self.plane.in_rows:
            rows, before, behind = self.rows(tier, skip, start, stop)
            weights = pad(weights, (before, behind)) if before + behind else weights
            return kernels.rows.mix(weights, rows), False
        if not self.on_codes:
            return weights @ self.decoded(tier, skip, start, stop), False
        return tier.mix(weights, skip, stop - start), True

    def whole(self, found: Mapping[bool, Tensor]) -> Tensor:
        """All sums in the model's basis, together."""
        if True not in found:
            return found[False]
        x = found[True]
        for transform, state, site in reversed(self.plane.transforms):
            x = transform.inverse(x, state, replace(site, positions=None))
        return x + found[False] if False in found else x
