"""Keys or values of one layer: encoded tokens in one or more tiers, then an exact tail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpack.core.roles import RowTransform, Transform
from kvpack.core.types import Shape, Site, State
from kvpack.recipe.kv_plan import drop_oldest
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.tail import Tail
from kvpack.runtime.tier import Tier
from kvpack.runtime.tokens import TokenTrack

PIECE_ELEMENTS = 1 << 22
"""Numbers that are encoded or decoded at a time; bounds the float32 copies that this takes."""

Placement = Callable[[int, int], "tuple[int, ...]"]
"""(tokens that have left the tail, token block) -> tokens per tier: `TierPolicy.placement`."""


class PlaneCache:
    """The slots of one plane, oldest first: some dropped, then encoded ones, then exact ones.

    Slots before `boundary` have left the tail. The tiers hold the newest of them, the first tier
    the newest; the tail [B, K, T, D] holds the slots from `tail_start` on, which lies behind
    `boundary` only where a sliding window made tokens useless before they could leave, always by
    whole blocks.

    Args:
        plan: transforms and codecs.
        placement: how old tokens are spread over the tiers.
        states: state of each online transform, in order, and of each codec.
        site: layer and rotary embedding for the transforms.
        like: a plane [B, K, T, D] whose shape but T, dtype and device are taken.
    """

    def __init__(
        self, plan: PlanePlan, placement: Placement, states: Sequence[State], site: Site, like: Tensor
    ) -> None:
        batch, heads, _, channels = like.shape
        self.block, self._placement = plan.block, placement
        shape: Shape = (batch, heads, self.block, channels)
        self.transforms: list[tuple[Transform, State, Site]] = []
        for transform, state in zip(plan.online, states, strict=False):
            self.transforms.append((transform, state, replace(site, kv_heads=shape[1])))
            shape = transform.shape(shape)
        of_codecs = states[len(plan.online) :]
        self.tiers = [
            Tier(codec, state, shape, like.dtype, like.device)
            for codec, state in zip(plan.codecs, of_codecs, strict=True)
        ]
        self._tail = Tail(like)
        self.boundary = self.tail_start = 0
        self._coded_shape = shape
        self._fitted: set[int] = set()

    @property
    def coded_shape(self) -> Shape:
        """[B, K', token block, D'] of what the codecs see."""
        return (self.tail_shape[0], *self._coded_shape[1:])

    @property
    def keeps_heads(self) -> bool:
        """Whether the codecs see one head for each of the plane's, of the same width."""
        return tuple(self._coded_shape[1::2]) == (self.tail_shape[1], self.tail_shape[3])

    @property
    def in_rows(self) -> bool:
        """Whether compiled loops can bring the codes back to the model's basis token by token."""
        backwards = len(self.row_transforms) == len(self.transforms)
        return backwards and all(tier.in_rows for tier in self.tiers)

    @property
    def row_transforms(self) -> list[tuple[RowTransform, State, Site]]:
        """The transforms that work token by token, with their states: all of them where `in_rows`."""
        return [(t, state, site) for t, state, site in self.transforms if isinstance(t, RowTransform)]

    def fit_prompt(self, queries: Tensor, tokens: TokenTrack) -> None:
        """Make the states of transforms that want it from the tail and its queries [B, H, T, D]."""
        if not any(transform.fits_prompt for transform, _, _ in self.transforms):
            return
        valid = tokens.valid_of(self.tail_start, self.length)
        positions = tokens.positions_of(self.tail_start, self.length)
        # One query head of every kv head at a time, so that positions fit the tokens.
        heads = list(torch.unflatten(queries, 1, (self.tail_shape[1], -1)).unbind(2))
        x: Tensor = self.tail
        for i, (transform, _, site) in enumerate(self.transforms):
            at = replace(site, positions=positions)
            if transform.fits_prompt:
                rows = None if valid is None else valid.repeat(1, len(heads))
                fitted = transform.fit_prompt(x, torch.cat(heads, 2), valid, rows)
                self.transforms[i] = (transform, {n: t.clone() for n, t in fitted.items()}, site)
                self._fitted.add(i)
            state = self.transforms[i][1]
            x, heads = transform.forward(x, state, at), [transform.query(q, state, at) for q in heads]

    @property
    def length(self) -> int:
        """Slots so far, dropped ones included."""
        return self.tail_start + self.tail_shape[2]

    @property
    def stored_tokens(self) -> int:
        """Tokens held in encoded form."""
        return sum(tier.tokens for tier in self.tiers)

    @property
    def encoded_tokens(self) -> int:
        """Tokens ever encoded; a token that changes tiers counts again."""
        return sum(tier.store.encoded_tokens for tier in self.tiers)

    @property
    def first(self) -> int:
        """The oldest slot that can still be read."""
        tail_only = self.tail_start > self.boundary or not self.stored_tokens
        return self.tail_start if tail_only else self.boundary - self.stored_tokens

    @property
    def _piece_tokens(self) -> int:
        return max(1, PIECE_ELEMENTS // (self.tail_shape[0] * self.tail_shape[1] * self.tail_shape[3]))

    @property
    def tail(self) -> Tensor:
        """The exact slots [B, K, T, D]; a view that the next change of the plane may overwrite."""
        return self._tail.tokens

    @property
    def tail_shape(self) -> tuple[int, int, int, int]:
        """That of `tail`."""
        return self._tail.shape

    def append(self, x: Tensor) -> None:
        """Add exact tokens [B, K, T, D] to the tail."""
        self._tail.append(x.detach())

    def encode(self, count: int, needed: int, tokens: TokenTrack, overlay: Overlay) -> None:
        """Move the `count` oldest slots behind `boundary` out of the tail, and others between tiers.

        Blocks that lie before slot `needed` as a whole are dropped without being encoded.
        """
        if not count:
            return
        start, stop = self.coming(count, needed), self.boundary + count
        if start > self.boundary:
            for tier in self.tiers:
                tier.store.clear()
        held = self.stored_tokens + stop - start
        target = drop_oldest(self._placement(stop, self.block), stop - held)
        for index in reversed(range(len(self.tiers))):
            start = self._fill(index, target[index], start, stop, tokens, overlay)
        self._tail.drop(max(0, stop - self.tail_start))
        self.boundary, self.tail_start = stop, max(stop, self.tail_start)

    def coming(self, count: int, needed: int) -> int:
        """The first slot that is encoded when `count` leave the tail: whole blocks may be useless."""
        useless = max(needed, self.tail_start) - self.boundary
        return self.boundary + min(count, max(0, useless // self.block * self.block))

    def _fill(
        self, index: int, target: int, start: int, stop: int, tokens: TokenTrack, overlay: Overlay
    ) -> int:
        """Bring a tier to `target` tokens, from younger tiers and then from the tail's slot `start` on.

        Returns the first slot that is still in the tail. The first tier takes all that is left.
        """
        tier = self.tiers[index]
        for younger in reversed(self.tiers[:index]):
            moved = min(younger.tokens, max(0, target - tier.tokens))
            if moved:
                self._step_down(younger, tier, moved, start, tokens, overlay)
        taken = stop - start if index == 0 else min(stop - start, max(0, target - tier.tokens))
        for length in tier.lengths(taken, self._piece_tokens):
            x = self.tail[:, :, start - self.tail_start : start - self.tail_start + length]
            positions = tokens.positions_of(start, start + length)
            for transform, state, site in self.transforms:
                x = transform.forward(x, state, replace(site, positions=positions))
            tier.append(x, self._valid(start, length, tokens, overlay), self.tiers[:index])
            start += length
        return start

    def _step_down(
        self, source: Tier, target: Tier, moved: int, start: int, tokens: TokenTrack, overlay: Overlay
    ) -> None:
        """Decode the `moved` oldest tokens of a tier and encode them in an older one.

        `start` is the first slot that is in no tier.
        """
        if target.take_over(source, moved):
            source.store.drop(moved)
            return
        younger = sum(tier.tokens for tier in self.tiers[: self.tiers.index(source) + 1])
        slot, left = start - younger, moved
        parts = []
        for x in source.read(0, self._piece_tokens, torch.float32):
            parts.append(x[:, :, :left])
            left -= parts[-1].shape[2]
            if not left:
                break
        whole = torch.cat(parts, 2)
        at = 0
        for length in target.lengths(moved, self._piece_tokens):
            valid = self._valid(slot + at, length, tokens, overlay)
            target.append(whole[:, :, at : at + length], valid)
            at += length
        source.store.drop(moved)

    def _valid(self, start: int, length: int, tokens: TokenTrack, overlay: Overlay) -> Tensor | None:
        """Which slots shape a codec's scales: neither padding nor protected ones; None for all."""
        valid = tokens.valid_of(start, start + length)
        protected = overlay.mask(self.tail_shape[0], start, start + length)
        if protected is None:
            return valid
        return ~protected if valid is None else valid & ~protected

    def read(self, out: Tensor, start: int, tokens: TokenTrack) -> None:
        """Write the slots from `start` on into `out` [B, K, at least that many, D]."""
        first = self.boundary - self.stored_tokens
        for tier in reversed(self.tiers):
            at = max(start, first)
            for decoded in tier.read(at - first, self._piece_tokens, self._decoded_dtype):
                stop = at + decoded.shape[2]
                x, positions = decoded, tokens.positions_of(at, stop)
                for transform, state, site in reversed(self.transforms):
                    x = transform.inverse(x, state, replace(site, positions=positions))
                out[:, :, at - start : stop - start] = x
                at = stop
            first += tier.tokens
        self._read_tail(out, start)

    def _read_tail(self, out: Tensor, start: int) -> None:
        tail = self.tail[:, :, max(0, start - self.tail_start) :]
        stop = self.length - start
        out[:, :, stop - tail.shape[2] : stop] = tail

    @property
    def _decoded_dtype(self) -> torch.dtype:
        return torch.float32 if self.transforms else self.tail.dtype

    def drop(self, needed: int) -> None:
        """Give up the memory of whole blocks before slot `needed`."""
        gone = max(0, needed - (self.boundary - self.stored_tokens))
        for tier in reversed(self.tiers):
            here = min(gone, tier.tokens)
            tier.store.drop(here)
            gone -= here
        self._drop_tail(needed)

    def _drop_tail(self, needed: int) -> None:
        useless = (needed - self.boundary) // self.block * self.block + self.boundary
        if useless > self.tail_start:
            self._tail.drop(useless - self.tail_start)
            self.tail_start = useless

    def crop(self, length: int) -> None:
        """Keep the slots before `length`; codes of a block that is cut stay as they are."""
        if length >= self.boundary:
            self._tail.crop(max(0, length - self.tail_start))
            return
        gone = self.boundary - length
        for tier in self.tiers:
            here = min(gone, tier.tokens)
            tier.store.crop(here)
            gone -= here
        self._tail.crop(0)
        self.boundary = self.tail_start = length

    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        for tier in self.tiers:
            tier.select(index)
        self._tail.select(index)
        for i in self._fitted:
            transform, state, site = self.transforms[i]
            picked = {n: t.index_select(0, index.to(t.device)) for n, t in state.items()}
            self.transforms[i] = (transform, picked, site)

    @property
    def _exact_nbytes(self) -> int:
        """Bytes of the exact tail and of states that belong to this cache alone."""
        fitted = (t for i in self._fitted for t in self.transforms[i][1].values())
        return sum(t.numel() * t.element_size() for t in (self.tail, *fitted))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the exact tail."""
        return self._exact_nbytes + sum(tier.store.nbytes for tier in self.tiers)

    @property
    def allocated_nbytes(self) -> int:
        """The same with the room to grow."""
        room = self._tail.allocated_nbytes - self._tail.nbytes
        return self._exact_nbytes + room + sum(tier.store.allocated_nbytes for tier in self.tiers)
