"""Keys or values of one layer whose coded tiers are filled by importance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpack.core.types import Site, State
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.plane import PlaneCache
from kvpack.runtime.ranking import Ranking
from kvpack.runtime.tokens import TokenTrack


class RankedPlane(PlaneCache):
    """A plane with two coded tiers; which one a token is in depends on the row and the head.

    A tier is a pool of gathered rows [B, K, n, D], in the order that `Chunk.places` gives. Every
    chunk that leaves the tail is split once, and its parts are appended to the two pools. Each pool
    has as many rows for every head, and on read they are put back to their slots.

    Args:
        plan: transforms and two codecs.
        ranking: decides before each `encode`; shared with the other plane.
        block: tokens that leave together, of both planes.
        states: state of each online transform, in order, and of each codec.
        site: layer and rotary embedding for the transforms.
        like: a plane [B, K, T, D] whose shape but T, dtype and device are taken.
    """

    def __init__(
        self, plan: PlanePlan, ranking: Ranking, block: int, states: Sequence[State], site: Site, like: Tensor
    ) -> None:
        super().__init__(plan, lambda tokens, _: (tokens, 0), states, site, like)
        self.ranking, self.block = ranking, block

    @property
    def first(self) -> int:
        """The oldest slot that can still be read."""
        return self.ranking.first if self.stored_tokens else self.tail_start

    def encode(self, count: int, needed: int, tokens: TokenTrack, overlay: Overlay) -> None:
        """Move the `count` oldest slots behind `boundary` out of the tail, to where the ranking says."""
        if not count:
            return
        start, stop = self.coming(count, needed), self.boundary + count
        if start < stop:
            self._admit(self._transformed(start, stop, tokens), start, stop, tokens)
        else:
            self._clear()
        self._tail.drop(max(0, stop - self.tail_start))
        self.boundary, self.tail_start = stop, max(stop, self.tail_start)

    def _transformed(self, start: int, stop: int, tokens: TokenTrack) -> Tensor:
        """Tokens of the tail as the codecs see them [B, K, T, D]."""
        x = self.tail[:, :, start - self.tail_start : stop - self.tail_start]
        positions = tokens.positions_of(start, stop)
        for transform, state, site in self.transforms:
            x = transform.forward(x, state, replace(site, positions=positions))
        return x

    def _clear(self) -> None:
        for tier in self.tiers:
            tier.store.clear()

    def _admit(self, x: Tensor, start: int, stop: int, tokens: TokenTrack) -> None:
        """Split new tokens [B, K, T, D] over the pools."""
        if self.ranking.first == start:
            self._clear()
        valid = tokens.valid_of(start, stop)
        for tier, places in zip(self.tiers, self.ranking.chunks[-1].places(valid), strict=True):
            at = 0
            for length in tier.lengths(places.shape[-1], self._piece_tokens):
                index = places[..., at : at + length]
                counts = None if valid is None else valid.gather(1, index[:, 0])
                tier.append(x.gather(2, _rows(index, x.shape[-1])), counts)
                at += length

    def read(self, out: Tensor, start: int, tokens: TokenTrack) -> None:
        """Write the slots from `start` on into `out` [B, K, at least that many, D]."""
        if self.stored_tokens:
            self._read_coded(out, start, tokens)
        self._read_tail(out, start)

    def _read_coded(self, out: Tensor, start: int, tokens: TokenTrack) -> None:
        first, held = self.ranking.first, self.boundary - self.ranking.first
        at_once = not self.transforms and start == first
        whole = out[:, :, :held] if at_once else self._like_coded(held)
        for index, places in enumerate(self.ranking.places(tokens)):
            at = 0
            for decoded in self._decoded(index):
                stop = at + decoded.shape[2]
                whole.scatter_(2, _rows(places[..., at:stop], whole.shape[-1]), decoded)
                at = stop
        if at_once:
            return
        for at in range(max(start, first), self.boundary, self._piece_tokens):
            stop = min(self.boundary, at + self._piece_tokens)
            x, positions = whole[:, :, at - first : stop - first], tokens.positions_of(at, stop)
            for transform, state, site in reversed(self.transforms):
                x = transform.inverse(x, state, replace(site, positions=positions))
            out[:, :, at - start : stop - start] = x

    def _like_coded(self, tokens: int) -> Tensor:
        shape = (*self.coded_shape[:2], tokens, self.coded_shape[3])
        return torch.empty(shape, dtype=self._decoded_dtype, device=self.tail.device)

    def _decoded(self, index: int) -> Iterator[Tensor]:
        """The pool of a tier in pieces [B, K, t, D]."""
        return self.tiers[index].read(0, self._piece_tokens, self._decoded_dtype)

    def drop(self, needed: int) -> None:
        """Give up chunks, and blocks of the tail, that lie before slot `needed` as a whole."""
        gone = self.ranking.expired(needed)
        high = sum(chunk.high for chunk in gone)
        self.tiers[0].store.drop(high)
        self.tiers[1].store.drop(sum(chunk.tokens for chunk in gone) - high)
        self._drop_tail(needed)


def _rows(index: Tensor, channels: int) -> Tensor:
    """`index` [B, K, n] for `gather` and `scatter_` along the tokens of [B, K, T, D]."""
    return index.unsqueeze(-1).expand(-1, -1, -1, channels)
