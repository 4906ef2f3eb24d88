"""Append-only storage of one plane's payloads: rows are written once and never encoded again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpack.core.types import TensorSpec

SPARE_TOKENS = 64
SPARE_FRACTION = 16
"""A full buffer grows by at least `SPARE_TOKENS` tokens and by 1/`SPARE_FRACTION` of its size."""


@dataclass(frozen=True)
class Piece:
    """Whole token blocks of a store, and which of their tokens are meant.

    `tensors` are views of the payload for `tokens` tokens; of the decoded tokens, `start` to
    `stop` are live.
    """

    tensors: dict[str, Tensor]
    tokens: int
    start: int
    stop: int


def pick(tensor: Tensor, rows: Tensor) -> Tensor:
    """`tensor[rows]` for any dtype: torch lacks the kernel for some one-byte floats."""
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw.index_select(0, rows.to(tensor.device)).view(tensor.dtype)


class BlockStore:
    """Payload tensors of consecutive token blocks, in buffers that grow at their token axis.

    The store counts two ways. *Physical* tokens are places in the buffers, in whole blocks. *Live*
    tokens are those that still count: cropping or dropping shortens `runs` (intervals of physical
    tokens, in order) and leaves the rows of a block that is cut as they are.

    Args:
        specs: payload tensors of one token block, token axis at -2 and batch axis first.
        block: tokens per block.
        device: where the buffers live.

    Buffers are never inference tensors, so that a cache filled under `torch.inference_mode` can be
    continued outside of it.
    """

    @torch.inference_mode(False)
    def __init__(self, specs: Mapping[str, TensorSpec], block: int, device: torch.device) -> None:
        self.block = block
        self.encoded_tokens = 0
        self.runs: list[tuple[int, int]] = []
        self._rows = {name: spec.shape[-2] for name, spec in specs.items()}
        self._first = self._blocks = 0
        self._buffers = {
            name: torch.empty(
                (*spec.shape[:-2], 0, spec.shape[-1]), dtype=getattr(torch, spec.dtype), device=device
            )
            for name, spec in specs.items()
        }

    @property
    def tokens(self) -> int:
        """Live tokens."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks in use, dead rows of partly cropped blocks included."""
        return self._bytes_per_block * (self._blocks - self._first)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffers, with the room to grow."""
        return self._bytes_per_block * self._capacity

    @property
    def _bytes_per_block(self) -> int:
        sizes = (
            b.shape[:-2].numel() * self._rows[n] * b.shape[-1] * b.element_size()
            for n, b in self._buffers.items()
        )
        return sum(sizes)

    @property
    def _capacity(self) -> int:
        return min((b.shape[-2] // self._rows[n] for n, b in self._buffers.items()), default=0)

    def append(self, tensors: Mapping[str, Tensor], tokens: int) -> None:
        """Copy the payload of `tokens` tokens, a multiple of the block, behind the newest block."""
        end = self._blocks + tokens // self.block
        if end > self._capacity:
            spare = max(-(-SPARE_TOKENS // self.block), end // SPARE_FRACTION) if self._blocks else 0
            self._move(end + spare)
            end = self._blocks + tokens // self.block
        for name, buffer in self._buffers.items():
            rows = self._rows[name]
            buffer.narrow(-2, self._blocks * rows, tensors[name].shape[-2]).copy_(tensors[name])
        start, stop = self._blocks * self.block, end * self.block
        if self.runs and self.runs[-1][1] == start:
            self.runs[-1] = (self.runs[-1][0], stop)
        else:
            self.runs.append((start, stop))
        self._blocks = end
        self.encoded_tokens += tokens

    def pieces(self, skip: int, most: int) -> Iterator[Piece]:
        """Live tokens after the `skip` oldest, in order, in pieces of about `most` tokens."""
        step = max(1, most // self.block) * self.block
        for first, last in self.runs:
            start, skip = first + min(skip, last - first), skip - min(skip, last - first)
            while start < last:
                base = start // self.block * self.block
                stop = min(last, base + step)
                blocks = -(-stop // self.block) - base // self.block
                yield Piece(
                    self._views(base // self.block, blocks), blocks * self.block, start - base, stop - base
                )
                start = stop

    def lengths(self) -> Iterator[int]:
        """Live tokens of each run, in order: a piece never reaches over two of them."""
        return (stop - start for start, stop in self.runs)

    def piece(self, skip: int, tokens: int) -> Piece:
        """The `tokens` live tokens after the `skip` oldest, which lie in one run."""
        for first, last in self.runs:
            if skip < last - first:
                start = first + skip
                base, end = start // self.block, -(-(start + tokens) // self.block)
                views, begin = self._views(base, end - base), start - base * self.block
                return Piece(views, (end - base) * self.block, begin, begin + tokens)
            skip -= last - first
        raise IndexError(f"there are no {tokens} tokens after {skip} more")

    def crop(self, tokens: int) -> None:
        """Forget the `tokens` newest live tokens."""
        while tokens and self.runs:
            start, stop = self.runs.pop()
            kept = max(start, stop - tokens)
            tokens -= stop - kept
            if kept > start:
                self.runs.append((start, kept))
        if self.runs:
            self._blocks = -(-self.runs[-1][1] // self.block)
        else:
            self.clear()

    def drop(self, tokens: int) -> None:
        """Forget the `tokens` oldest live tokens; blocks without live tokens give up their memory."""
        while tokens and self.runs:
            start, stop = self.runs.pop(0)
            kept = min(stop, start + tokens)
            tokens -= kept - start
            if kept < stop:
                self.runs.insert(0, (kept, stop))
        if not self.runs:
            self.clear()
            return
        self._first = self.runs[0][0] // self.block
        if 2 * self._first > self._blocks:
            self._move(self._blocks)

    @torch.inference_mode(False)
    def clear(self) -> None:
        """Forget everything and free the buffers."""
        self.runs, self._first, self._blocks = [], 0, 0
        self._buffers = {n: b.new_empty((*b.shape[:-2], 0, b.shape[-1])) for n, b in self._buffers.items()}

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        self._buffers = {name: pick(buffer, index) for name, buffer in self._buffers.items()}

    def _views(self, block: int, blocks: int) -> dict[str, Tensor]:
        return {
            name: buffer.narrow(-2, block * self._rows[name], blocks * self._rows[name])
            for name, buffer in self._buffers.items()
        }

    @torch.inference_mode(False)
    def _move(self, blocks: int) -> None:
        """Copy the live blocks to new buffers; `blocks` is the capacity before dead ones are left out."""
        dead, live = self._first, self._blocks - self._first
        for name, view in self._views(dead, live).items():
            rows = self._rows[name]
            buffer = view.new_empty((*view.shape[:-2], (blocks - dead) * rows, view.shape[-1]))
            buffer.narrow(-2, 0, live * rows).copy_(view)
            self._buffers[name] = buffer
        self.runs = [(a - dead * self.block, b - dead * self.block) for a, b in self.runs]
        self._first, self._blocks = 0, live
