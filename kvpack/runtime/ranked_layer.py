"""The compressed cache of a layer that must see attention before it can encode."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpack.core.errors import UsageError
from kvpack.core.roles import Plane
from kvpack.core.types import ScoreView, Site
from kvpack.models.attention_interface import visible
from kvpack.runtime.demoting import DemotingPlane
from kvpack.runtime.layer import KVPackLayer
from kvpack.runtime.plane import Placement, PlaneCache
from kvpack.runtime.ranked import RankedPlane
from kvpack.runtime.ranking import Ranking


class RankedLayer(KVPackLayer):
    """A layer whose tiers are filled by importance, or whose transforms are fitted to the prompt.

    Tokens wait in the exact tail until `attend` has shown the queries of their forward pass, and are
    encoded then. A plane whose tiers have the same codec has no use for the ranking and goes by age.

    Arguments as of `KVPackLayer`.
    """

    _ranking: Ranking | None = None
    _unseen = 0

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # an attribute in transformers
        """Whether tokens can be taken back: not once their attention has shaped a ranking."""
        return self.plan.policy.scorer is None

    def _make_planes(self, key_states: Tensor, value_states: Tensor) -> dict[Plane, PlaneCache]:
        likes: dict[Plane, Tensor] = {"key": key_states, "value": value_states}
        ranked = [name for name in likes if self.plan.ranked(name)]
        if ranked:
            shape = self.plan.plane(ranked[0]).coded_shape(tuple(likes[ranked[0]].shape))
            self._ranking = Ranking(self.plan.policy, shape[1])
        return {name: self._make_plane(name, like) for name, like in likes.items()}

    def _make_plane(self, name: Plane, like: Tensor) -> PlaneCache:
        plan, block = self.plan.plane(name), self.plan.block(name)
        states = [{n: t.to(like.device) for n, t in state.items()} for state in self._states[name]]
        site = Site(self.plan.attention.layer, self._rope, None, like.shape[1])
        if self._ranking is not None and self.plan.ranked(name):
            kind = DemotingPlane if self.plan.policy.demote else RankedPlane
            return kind(plan, self._ranking, block, states, site, like)
        placement: Placement = partial(self.plan.policy.placement, plane=name)
        if self.plan.policy.scorer is not None:
            placement = _first_tier
        plane = PlaneCache(plan, placement, states, site, like)
        plane.block = block
        return plane

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `KVPackLayer.update`; what the pass itself brings is exact until `attend`.

        Raises:
            UsageError: also when the cache was never shown the last pass's attention.
        """
        if self._unseen:
            raise UsageError(
                f"layer {self.plan.attention.layer}: the cache was not shown how its tokens were attended to",
                why="the recipe ranks tokens by attention, or fits a scale to the queries",
                hint="keep the attention implementation with which kvpack.load returned the model",
            )
        self._unseen = key_states.shape[2] if self.plan.sees_attention else 0
        try:
            return super().update(key_states, value_states, *args, **kwargs)
        except Exception:
            self._unseen = 0
            raise

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        super()._append(key_states, value_states)
        if self._ranking is not None and not self._unseen:
            length, track = self.get_seq_length(), self.track
            valid = track.valid_of(length - key_states.shape[2], length)
            layer = self.plan.attention.layer
            view = ScoreView(layer, valid, embeddings=track.embeddings, text=track.text)
            with torch.no_grad():
                self._ranking.observe(view, length)

    @property
    def sees_attention(self) -> bool:
        """Whether `attend` must be called between `update` and attention."""
        return self.plan.sees_attention

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Score the tokens and encode what leaves the tail; see `KVPackLayer.attend`.

        Returns:
            None, or keys and values as stored in a cache made with ``exact_prefill=False``.
        """
        new, self._unseen = self._unseen, 0
        if not new:
            return None
        length = self.get_seq_length()
        past = length - new
        with torch.no_grad():
            if past == 0:
                for plane in self._planes.values():
                    plane.fit_prompt(query, self.track)
            if self._ranking is not None:
                seen = None if mask is None else visible(mask, query, key)
                valid = self.track.valid_of(past, length)
                view = ScoreView(self.plan.attention.layer, valid, query, key, seen, scaling)
                self._ranking.observe(view, length)
        if not self.exact_prefill:
            start = self._window_start(past)
            self._encode(start)
            held = self._read(start, length)
            self._drop()
            return (*held, mask)
        if not self.record_past:
            self._encode(self._window_start(length))
            self._drop()
        return None

    def _encode(self, needed: int) -> None:
        """Decide which tiers the leaving tokens belong to, and encode them; later in `update`."""
        if self._unseen:
            return
        for name, plane in self._planes.items():
            count = self._leaving(name)
            if self._ranking is not None and count and self.plan.ranked(name):
                start = plane.coming(count, needed)
                with torch.no_grad():
                    self._ranking.admit(start, plane.boundary + count, needed, self.track)
                break
        super()._encode(needed)

    def _drop(self) -> None:
        """Free what fell out of the sliding window; later in `update`."""
        if self._unseen:
            return
        super()._drop()
        if self.sliding_window is not None and self._ranking is not None:
            plane = next(p for p in self._planes.values() if isinstance(p, RankedPlane))
            self._ranking.drop(self._window_start(self.get_seq_length()), plane.tail_start)

    def activate_past_recording(self) -> None:
        """As `KVPackLayer.activate_past_recording`.

        Raises:
            UsageError: also where tokens are ranked.
        """
        self._check_unranked()
        super().activate_past_recording()

    def _check_croppable(self, length: int) -> None:
        self._check_unranked()
        super()._check_croppable(length)

    def _check_unranked(self) -> None:
        if self.plan.policy.scorer is not None:
            raise UsageError(
                "tokens cannot be taken back from a cache that ranks them by importance",
                why="the attention of the removed tokens has shaped the ranking of those before them",
                hint="generate without an assistant, or use a recipe that goes by age, such as kivi",
            )

    def reset(self) -> None:
        """Forget everything; the next update begins anew."""
        super().reset()
        self._ranking, self._unseen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i of the batch what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        if self._ranking is not None:
            self._ranking.select(beam_idx)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, exact tails, masks of the tiers and sums for scores."""
        return super().nbytes + (0 if self._ranking is None else self._ranking.nbytes)

    @property
    def allocated_nbytes(self) -> int:
        """The same with the room to grow."""
        return super().allocated_nbytes + (0 if self._ranking is None else self._ranking.nbytes)


def _first_tier(tokens: int, block: int) -> tuple[int, ...]:
    """A plane with one codec needs one tier."""
    return (tokens, 0)
