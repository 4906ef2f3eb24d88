"""What a cache knows of its tokens, shared by all layers: positions and padding."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from kvpack.core.errors import UsageError
from kvpack.core.rows import Step


class TokenTrack:
    """Positions and validity of every token slot, padding included.

    `length` counts the slots, with those of the forward pass that is under way. `positions` is
    int32 [B or 1, T], None when the model does not tell them; `valid` is bool [B, T], None while
    there is no padding. `hidden` holds the input of a decoder layer [B, T, C] until the layer's
    cache takes it; `embeddings` [B, T, C] and `text` [B, T] are the model's input embeddings and,
    where the caller told them, which tokens are text. `turns` is scratch: rotary embeddings of stretches
    of slots, made by the first layer of a pass that needs them.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.length = self.past = self.batch = 0
        self.positions: Tensor | None = None
        self.valid: Tensor | None = None
        self.hidden: dict[int, Tensor] = {}
        self.embeddings: Tensor | None = None
        self.text: Tensor | None = None
        self._seen: Tensor | None = None
        self.turns: dict[Hashable, tuple[Step, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of positions and validity."""
        return sum(t.numel() * t.element_size() for t in (self.positions, self.valid) if t is not None)

    def begin(self, past: int, batch: int, tokens: int, attention_mask: Tensor | None) -> None:
        """Announce a forward pass over `tokens` new slots behind `past` old ones.

        Args:
            past: slots that the layers hold.
            batch: rows of the batch.
            tokens: new slots.
            attention_mask: [B, past + tokens], 0 or False for padding. None, or a mask of another
                rank that the caller prepared, means that every new slot counts.

        Raises:
            UsageError: the batch changed, or the mask does not reach over the new tokens.
        """
        if past and batch != self.batch:
            raise UsageError(
                f"the cache holds {self.batch} sequences, the model got {batch}",
                hint="start a new cache, or call batch_select_indices / batch_repeat_interleave on it first",
            )
        self.crop(past)
        self.past, self.length, self.batch = past, past + tokens, batch
        self.hidden, self._seen, self.turns = {}, None, {}
        self.embeddings = self.text = None
        new = None
        if attention_mask is not None and attention_mask.dim() == 2:
            if attention_mask.shape[1] < self.length:
                raise UsageError(
                    f"the attention mask covers {attention_mask.shape[1]} tokens of {self.length}",
                    why="it must cover the cached tokens and the new ones",
                    hint="concatenate the masks of all calls",
                )
            new = attention_mask[:, past : self.length].bool()
        if new is not None and (self.valid is not None or not bool(new.all())):
            old = self.valid if self.valid is not None else new.new_ones((batch, past))
            self.valid = torch.cat((old, new), -1)
        elif self.valid is not None:
            self.valid = torch.cat((self.valid, self.valid.new_ones((batch, tokens))), -1)

    def locate(self, position_ids: Tensor) -> None:
        """Record the positions [B or 1, T] of the announced tokens; other ranks are not kept."""
        if position_ids.dim() != 2 or position_ids.shape[-1] != self.length - self.past:
            return
        new = position_ids.to(torch.int32)
        if new.shape[0] > 1 and bool((new == new[:1]).all()):
            new = new[:1]
        if self.past == 0:
            self.positions = new.clone()
        elif self.positions is not None and self.positions.shape[-1] == self.past:
            rows = max(self.positions.shape[0], new.shape[0])
            both = [t.expand(rows, -1) for t in (self.positions, new)]
            self.positions = torch.cat(both, -1)

    def positions_of(self, start: int, stop: int) -> Tensor | None:
        """Positions of slots `start` to `stop`, None when they were not all recorded."""
        if self.positions is None or self.positions.shape[-1] < stop:
            return None
        return self.positions[:, start:stop]

    def valid_of(self, start: int, stop: int) -> Tensor | None:
        """Validity [B, stop - start], None when no slot at all is padding."""
        return None if self.valid is None else self.valid[:, start:stop]

    def seen(self, device: torch.device) -> Tensor:
        """Valid tokens of each row before the announced ones, int64 [B]."""
        if self._seen is None:
            if self.valid is None:
                self._seen = torch.full((self.batch,), self.past, device=device)
            else:
                self._seen = self.valid[:, : self.past].sum(-1)
        return self._seen

    def crop(self, length: int) -> None:
        """Keep the `length` oldest slots."""
        if length == 0:
            self.clear()
        self.length = min(self.length, length)
        self.positions = None if self.positions is None else self.positions[:, :length].clone()
        self.valid = None if self.valid is None else self.valid[:, :length].clone()

    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        self.batch, self._seen = len(index), None
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = self.positions.index_select(0, index.to(self.positions.device))
        if self.valid is not None:
            self.valid = self.valid.index_select(0, index.to(self.valid.device))
