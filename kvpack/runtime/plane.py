"""Keys or values of one layer: encoded tokens, then an exact tail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpack.core.roles import Transform
from kvpack.core.types import Payload, Shape, Site, State
from kvpack.recipe.plan import PlanePlan
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.store import BlockStore
from kvpack.runtime.tokens import TokenTrack

PIECE_ELEMENTS = 1 << 22
"""Numbers that are encoded or decoded at a time; bounds the float32 copies that this takes."""


class PlaneCache:
    """The slots of one plane, oldest first: some dropped, then encoded ones, then exact ones.

    Slots before `boundary` have left the tail. The store holds the newest of them, the tail
    [B, K, T, D] the slots from `tail_start` on; `tail_start` lies behind `boundary` only where a
    sliding window made tokens useless before they could leave, always by whole blocks.

    Args:
        plan: transforms and codec.
        states: state of each online transform, in order, and of the codec.
        site: layer and rotary embedding for the transforms.
        like: a plane [B, K, T, D] whose shape but T, dtype and device are taken.
    """

    def __init__(self, plan: PlanePlan, states: Sequence[State], site: Site, like: Tensor) -> None:
        batch, heads, _, channels = like.shape
        self.codec, self.block = plan.codec, plan.codec.token_block
        *transform_states, self.codec_state = states
        shape: Shape = (batch, heads, self.block, channels)
        self.transforms: list[tuple[Transform, State, Site]] = []
        for transform, state in zip(plan.online, transform_states, strict=True):
            self.transforms.append((transform, state, replace(site, kv_heads=shape[1])))
            shape = transform.shape(shape)
        self.coded = shape
        specs = plan.codec.spec(self.coded, str(like.dtype).removeprefix("torch."))
        self.store = BlockStore(specs, self.block, like.device)
        self.tail = like.new_empty((batch, heads, 0, channels))
        self.boundary = self.tail_start = 0

    @property
    def length(self) -> int:
        """Slots so far, dropped ones included."""
        return self.tail_start + self.tail.shape[2]

    @property
    def first(self) -> int:
        """The oldest slot that can still be read."""
        tail_only = self.tail_start > self.boundary or not self.store.tokens
        return self.tail_start if tail_only else self.boundary - self.store.tokens

    @property
    def _piece_tokens(self) -> int:
        return max(1, PIECE_ELEMENTS // (self.tail.shape[0] * self.tail.shape[1] * self.tail.shape[3]))

    def append(self, x: Tensor) -> None:
        """Add exact tokens [B, K, T, D] to the tail."""
        self.tail = torch.cat((self.tail, x.detach().to(self.tail.dtype)), 2)

    def encode(self, count: int, needed: int, tokens: TokenTrack, overlay: Overlay) -> None:
        """Move the `count` oldest slots behind `boundary` out of the tail.

        Blocks that lie before slot `needed` as a whole are dropped without being encoded.
        """
        useless = max(needed, self.tail_start) - self.boundary
        skipped = min(count, max(0, useless // self.block * self.block))
        if skipped:
            self.store.clear()
        start, stop = self.boundary + skipped, self.boundary + count
        step = max(1, self._piece_tokens // self.block) * self.block
        for at in range(start, stop, step):
            self._encode(at, min(stop, at + step), tokens, overlay)
        if count:
            self.tail = self.tail[:, :, max(0, stop - self.tail_start) :].clone()
            self.boundary, self.tail_start = stop, max(stop, self.tail_start)

    def _encode(self, start: int, stop: int, tokens: TokenTrack, overlay: Overlay) -> None:
        x = self.tail[:, :, start - self.tail_start : stop - self.tail_start]
        positions = tokens.positions_of(start, stop)
        for transform, state, site in self.transforms:
            x = transform.forward(x, state, replace(site, positions=positions))
        valid = tokens.valid_of(start, stop)
        protected = overlay.mask(x.shape[0], start, stop)
        if protected is not None:
            valid = ~protected if valid is None else valid & ~protected
        payload = self.codec.encode(
            x, self.codec_state, None if valid is None or bool(valid.all()) else valid
        )
        self.store.append(payload.tensors, stop - start)

    def read(self, out: Tensor, start: int, tokens: TokenTrack) -> None:
        """Write the slots from `start` on into `out` [B, K, at least that many, D]."""
        at = max(start, self.boundary - self.store.tokens)
        for piece in self.store.pieces(at - (self.boundary - self.store.tokens), self._piece_tokens):
            stop = at + piece.stop - piece.start
            shape = (*self.coded[:2], piece.tokens, self.coded[3])
            x = self.codec.decode(Payload(piece.tensors, shape), self.codec_state, self._decoded_dtype)
            x = x[:, :, piece.start : piece.stop]
            positions = tokens.positions_of(at, stop)
            for transform, state, site in reversed(self.transforms):
                x = transform.inverse(x, state, replace(site, positions=positions))
            out[:, :, at - start : stop - start] = x
            at = stop
        tail = self.tail[:, :, max(0, start - self.tail_start) :]
        stop = self.length - start
        out[:, :, stop - tail.shape[2] : stop] = tail

    @property
    def _decoded_dtype(self) -> torch.dtype:
        return torch.float32 if self.transforms else self.tail.dtype

    def drop(self, needed: int) -> None:
        """Give up the memory of whole blocks before slot `needed`."""
        self.store.drop(max(0, needed - (self.boundary - self.store.tokens)))
        useless = (needed - self.boundary) // self.block * self.block + self.boundary
        if useless > self.tail_start:
            self.tail = self.tail[:, :, useless - self.tail_start :].clone()
            self.tail_start = useless

    def crop(self, length: int) -> None:
        """Keep the slots before `length`; codes of a block that is cut stay as they are."""
        if length >= self.boundary:
            self.tail = self.tail[:, :, : max(0, length - self.tail_start)].clone()
            return
        self.store.crop(self.boundary - length)
        self.tail = self.tail[:, :, :0].clone()
        self.boundary = self.tail_start = length

    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        self.store.select(index)
        self.tail = self.tail.index_select(0, index.to(self.tail.device))
        self.coded = (len(index), *self.coded[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the exact tail."""
        return self.store.nbytes + self.tail.numel() * self.tail.element_size()

    @property
    def allocated_nbytes(self) -> int:
        """The same with the store's room to grow."""
        return self.store.allocated_nbytes + self.tail.numel() * self.tail.element_size()
