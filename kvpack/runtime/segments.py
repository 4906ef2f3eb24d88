"""Append-only storage of payloads that can only be decoded as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpack.runtime.store import Piece, pick


@dataclass(frozen=True)
class _Segment:
    """The payload of `tokens` tokens, of which `start` to `stop` are live."""

    tensors: dict[str, Tensor]
    tokens: int
    start: int
    stop: int

    @property
    def live(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class SegmentStore:
    """Payloads of consecutive segments, each kept as it was encoded; used like a `BlockStore`.

    A segment gives up its memory when its last live token is cropped or dropped.
    """

    def __init__(self) -> None:
        self.encoded_tokens = 0
        self._segments: list[_Segment] = []

    @property
    def tokens(self) -> int:
        """Live tokens."""
        return sum(segment.live for segment in self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all segments, tokens that are no longer live included."""
        return sum(segment.nbytes for segment in self._segments)

    @property
    def allocated_nbytes(self) -> int:
        """The same: segments have no room to grow."""
        return self.nbytes

    @torch.inference_mode(False)
    def append(self, tensors: Mapping[str, Tensor], tokens: int) -> None:
        """Keep the payload of one segment of `tokens` tokens."""
        # Copies, because a cache filled under inference mode may be continued outside of it.
        held = {name: tensor.clone() for name, tensor in tensors.items()}
        self._segments.append(_Segment(held, tokens, 0, tokens))
        self.encoded_tokens += tokens

    def pieces(self, skip: int, most: int) -> Iterator[Piece]:
        """Live tokens after the `skip` oldest, in order, segment by segment, however long they are."""
        for segment in self._segments:
            start = segment.start + min(skip, segment.live)
            skip -= start - segment.start
            if start < segment.stop:
                yield Piece(segment.tensors, segment.tokens, start, segment.stop)

    def lengths(self) -> Iterator[int]:
        """Live tokens of each segment, in order: a piece never reaches over two of them."""
        return (segment.live for segment in self._segments)

    def piece(self, skip: int, tokens: int) -> Piece:
        """The `tokens` live tokens after the `skip` oldest, which lie in one segment."""
        for segment in self._segments:
            if skip < segment.live:
                start = segment.start + skip
                return Piece(segment.tensors, segment.tokens, start, start + tokens)
            skip -= segment.live
        raise IndexError(f"there are no {tokens} tokens after {skip} more")

    def crop(self, tokens: int) -> None:
        """Forget the `tokens` newest live tokens."""
        while tokens and self._segments:
            last = self._segments.pop()
            kept = max(0, last.live - tokens)
            tokens -= last.live - kept
            if kept:
                self._segments.append(replace(last, stop=last.start + kept))

    def drop(self, tokens: int) -> None:
        """Forget the `tokens` oldest live tokens."""
        while tokens and self._segments:
            first = self._segments.pop(0)
            gone = min(first.live, tokens)
            tokens -= gone
            if gone < first.live:
                self._segments.insert(0, replace(first, start=first.start + gone))

    def clear(self) -> None:
        """Forget everything."""
        self._segments = []

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        self._segments = [
            replace(s, tensors={n: pick(t, index) for n, t in s.tensors.items()}) for s in self._segments
        ]
