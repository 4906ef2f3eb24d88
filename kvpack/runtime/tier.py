"""One coded tier of a plane: a codec, its state and what it has encoded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvpack.core.roles import Codec
from kvpack.core.rows import TokenRows
from kvpack.core.types import Payload, Shape, State
from kvpack.recipe.plane_plan import segments
from kvpack.runtime.segments import SegmentStore
from kvpack.runtime.store import BlockStore, Piece


class Tier:
    """Tokens in the order of their age, encoded by one codec.

    Args:
        codec: encodes [B, K, T, D].
        state: its state.
        shape: [B, K, any, D] of what it will be given.
        dtype: of the plane, where a codec keeps numbers as they are.
        device: where codes live.
    """

    def __init__(
        self, codec: Codec, state: State, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.codec, self.state, self.block = codec, state, codec.token_block
        self._shape = shape
        if codec.segment:
            self.store: BlockStore | SegmentStore = SegmentStore()
        else:
            one = (*shape[:2], self.block, shape[3])
            specs = codec.spec(one, str(dtype).removeprefix("torch."))
            self.store = BlockStore(specs, self.block, device)

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.store.tokens

    def lengths(self, tokens: int, most: int) -> Iterator[int]:
        """In which pieces to encode `tokens` tokens: segments, or about `most` tokens at a time."""
        if self.codec.segment:
            yield from segments(self.codec, tokens)
            return
        step = max(1, most // self.block) * self.block
        for start in range(0, tokens, step):
            yield min(step, tokens - start)

    def append(self, x: Tensor, valid: Tensor | None, younger: Sequence[Tier] = ()) -> None:
        """Encode tokens [B, K, T, D] behind the newest; `valid` [B, T] marks those that shape scales.

        A last block that they do not fill is filled up with tokens that are never read. Where the
        codecs of the `younger` tiers nest, the codes are those that tokens would have after a walk
        through these tiers, so that a prompt in one piece and token by token end in the same bytes.
        """
        tokens = x.shape[2]
        spare = -tokens % self.block
        if spare:
            x = torch.cat((x, x[:, :, -1:].expand(-1, -1, spare, -1)), 2)
            valid = x.new_ones((x.shape[0], tokens), dtype=torch.bool) if valid is None else valid
            valid = torch.cat((valid, valid.new_zeros((x.shape[0], spare))), -1)
        if valid is not None and bool(valid.all()):
            valid = None
        self.store.append(self._encode(x, valid, younger).tensors, tokens + spare)
        self.store.crop(spare)
        self.store.encoded_tokens -= spare

    def _encode(self, x: Tensor, valid: Tensor | None, younger: Sequence[Tier]) -> Payload:
        ladder = [*younger, self]
        steps = [a.codec.lowering(b.codec) for a, b in pairwise(ladder)]
        known = [step for step in steps if step is not None]
        if len(known) < len(steps):
            return self.codec.encode(x, self.state, valid)
        payload = ladder[0].codec.encode(x, ladder[0].state, valid)
        for lowered in known:
            payload = lowered(payload)
        return payload

    def take_over(self, source: Tier, tokens: int) -> bool:
        """Lower the codes of the `tokens` oldest tokens of another tier; False where that cannot be.

        Whole blocks can be lowered, by codecs that nest this one.
        """
        lowered = source.codec.lowering(self.codec)
        if lowered is None or self.codec.segment or source.codec.segment:
            return False
        pieces = [piece for piece in source.store.pieces(0, tokens) if piece.tokens]
        first = pieces[0]
        whole = first.start == 0 and first.tokens >= tokens and first.stop >= tokens
        if not whole or tokens % math.lcm(self.block, source.block):
            return False
        payload = Payload(first.tensors, (*self._shape[:2], first.tokens, self._shape[3])).rows(0, tokens)
        self.store.append(lowered(payload).tensors, tokens)
        return True

    def read(self, skip: int, most: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Decoded tokens after the `skip` oldest, in pieces [B, K, t, D] of about `most` tokens."""
        for piece in self.store.pieces(skip, most):
            x = self.codec.decode(self._payload(piece), self.state, dtype)
            yield x[:, :, piece.start : piece.stop]

    def scores(self, query: Tensor, skip: int, tokens: int) -> Tensor:
        """Products of queries [B, K, M, D] with the `tokens` tokens after the `skip` oldest, [B, K, M, t]."""
        piece = self.store.piece(skip, tokens)
        found = self.codec.scores(query, self._payload(piece), self.state)
        return found[..., piece.start : piece.stop]

    def mix(self, weights: Tensor, skip: int, tokens: int) -> Tensor:
        """Sums of the `tokens` tokens after the `skip` oldest with weights [B, K, M, t], [B, K, M, D]."""
        piece = self.store.piece(skip, tokens)
        if tokens < piece.tokens:
            weights = torch.nn.functional.pad(weights, (piece.start, piece.tokens - piece.stop))
        return self.codec.mix(weights, self._payload(piece), self.state)

    def stored(self, skip: int, tokens: int) -> tuple[Payload, int]:
        """The payload of the `tokens` tokens after the `skip` oldest; others in it stand before them."""
        piece = self.store.piece(skip, tokens)
        return self._payload(piece), piece.start

    @property
    def in_rows(self) -> bool:
        """Whether compiled loops can decode the tokens one after another."""
        return self.codec.in_rows

    def rows(self, skip: int, tokens: int) -> tuple[TokenRows, int, int]:
        """The `tokens` tokens after the `skip` oldest, and how many others stand before and behind them."""
        piece = self.store.piece(skip, tokens)
        found = self.codec.token_rows(self._payload(piece), self.state)
        return found, piece.start, piece.tokens - piece.stop

    def decode(self, skip: int, tokens: int) -> Tensor:
        """The `tokens` tokens after the `skip` oldest, float32 [B, K, t, D]."""
        piece = self.store.piece(skip, tokens)
        x = self.codec.decode(self._payload(piece), self.state, torch.float32)
        return x[:, :, piece.start : piece.stop]

    def _payload(self, piece: Piece) -> Payload:
        return Payload(piece.tensors, (*self._shape[:2], piece.tokens, self._shape[3]))

    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        self.store.select(index)
        self._shape = (len(index), *self._shape[1:])
