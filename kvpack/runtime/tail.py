"""The newest tokens of a plane as they are, in a buffer with room for more."""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 16
"""Tokens for which there is room when a buffer is made, beside those that it is made for."""


class Tail:
    """Tokens [B, K, T, D] that grow at the young end and leave at the old one.

    A token is copied when it comes and, once in every `SPARE` or T tokens, when those that left have
    made room; a buffer much larger than its tokens is given back.

    Args:
        like: a plane [B, K, any, D] whose shape but T, dtype and device are taken.
    """

    def __init__(self, like: Tensor) -> None:
        batch, heads, _, channels = like.shape
        self._buffer = like.new_empty((batch, heads, 0, channels))
        self._start = self._stop = 0

    @property
    def tokens(self) -> Tensor:
        """The tokens [B, K, T, D]; a view that the next change may overwrite."""
        return self._buffer[:, :, self._start : self._stop]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of `tokens`."""
        batch, heads, _, channels = self._buffer.shape
        return batch, heads, self._stop - self._start, channels

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens."""
        return self._bytes_per_token * (self._stop - self._start)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._bytes_per_token * self._buffer.shape[2]

    @property
    def _bytes_per_token(self) -> int:
        batch, heads, _, channels = self._buffer.shape
        return batch * heads * channels * self._buffer.element_size()

    def append(self, x: Tensor) -> None:
        """Add tokens [B, K, T, D] behind the newest."""
        stop = self._stop + x.shape[2]
        if stop > self._buffer.shape[2]:
            self._move(self._stop - self._start + x.shape[2])
            stop = self._stop + x.shape[2]
        self._buffer[:, :, self._stop : stop] = x
        self._stop = stop

    def drop(self, tokens: int) -> None:
        """Forget the `tokens` oldest."""
        self._start = min(self._stop, self._start + tokens)
        self._shrink()

    def crop(self, tokens: int) -> None:
        """Keep the `tokens` oldest."""
        self._stop = min(self._stop, self._start + tokens)
        self._shrink()

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        self._buffer = self._buffer.index_select(0, index.to(self._buffer.device))

    def _shrink(self) -> None:
        held = self._stop - self._start
        if self._buffer.shape[2] > 2 * (held + SPARE):
            self._move(held)

    @torch.inference_mode(False)
    def _move(self, tokens: int) -> None:
        """Copy what is held to a buffer for `tokens` tokens and some more."""
        held = self.tokens
        batch, heads, count, channels = held.shape
        # Never an inference tensor: a cache filled under inference mode may be continued outside of it.
        buffer = held.new_empty((batch, heads, tokens + SPARE, channels))
        buffer[:, :, :count] = held
        self._buffer, self._start, self._stop = buffer, 0, count
