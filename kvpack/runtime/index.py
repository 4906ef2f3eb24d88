"""The index of one layer: codes of all keys, and scores of queries with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpack.core.types import Payload, Site, State
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.plane import PlaneCache
from kvpack.runtime.tokens import TokenTrack

SCORE_ELEMENTS = 1 << 22
"""Scores that are computed at a time; bounds what a long text takes."""


class Index:
    """Codes of every token, made as it comes, on the model's device.

    Args:
        plan: the chain; its codec takes tokens one by one.
        states: state of each transform, in order, and of the codec.
        site: layer and rotary embedding.
        like: keys [B, K, T, D] whose shape but T, dtype and device are taken.
    """

    def __init__(self, plan: PlanePlan, states: Sequence[State], site: Site, like: Tensor) -> None:
        states = [{n: t.to(like.device) for n, t in state.items()} for state in states]
        self._plane = PlaneCache(plan, lambda tokens, block: (tokens,), states, site, like)
        self._none_protected = Overlay(like)

    def append(self, key: Tensor, tokens: TokenTrack) -> None:
        """Code keys [B, K, T, D] after RoPE, the newest that `tokens` knows of."""
        self._plane.append(key)
        with torch.no_grad():
            self._plane.encode(key.shape[2], 0, tokens, self._none_protected)

    def scores(self, query: Tensor, tokens: TokenTrack) -> Iterator[tuple[slice, Tensor]]:
        """Approximate products of queries with all keys, in blocks of query rows.

        Args:
            query: [B, H, T, D] after RoPE, of the newest T tokens.
            tokens: their positions.

        Yields:
            Rows, and their scores float32 [B, H, rows, S], not scaled.
        """
        turned = self._turned(query, tokens)
        batch, kv_heads, group, count, _ = turned.shape
        step = max(1, SCORE_ELEMENTS // (batch * kv_heads * group * self._plane.length))
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            found = self._products(turned[:, :, :, part].flatten(2, 3))
            yield part, torch.unflatten(found, 2, (group, -1)).flatten(1, 2)

    def _turned(self, query: Tensor, tokens: TokenTrack) -> Tensor:
        """Queries [B, K, G, T, D'] in the basis of the codes."""
        count, length = query.shape[2], self._plane.length
        positions = tokens.positions_of(length - count, length)
        grouped = torch.unflatten(query, 1, (self._plane.tail_shape[1], -1))
        # One query head of every kv head at a time, so that positions fit the tokens.
        heads = list(grouped.unbind(2))
        for transform, state, site in self._plane.transforms:
            at = replace(site, positions=positions)
            heads = [transform.query(x, state, at) for x in heads]
        return torch.stack(heads, 2)

    def _products(self, query: Tensor) -> Tensor:
        """Scores [B, K, R, S] of queries [B, K, R, D']."""
        tier = self._plane.tiers[0]
        parts = []
        for piece in tier.store.pieces(0, self._plane.length):
            payload = Payload(piece.tensors, (*query.shape[:2], piece.tokens, query.shape[3]))
            found = tier.codec.scores(query, payload, tier.state)
            parts.append(found[..., piece.start : piece.stop])
        return torch.cat(parts, -1)

    def crop(self, length: int) -> None:
        """Keep the tokens before `length`."""
        self._plane.crop(length)

    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        self._plane.select(index)
        self._none_protected.select(index)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self._plane.nbytes

    @property
    def allocated_nbytes(self) -> int:
        """The same with the room to grow."""
        return self._plane.allocated_nbytes
