"""What takes something back from a layer of a cache: newest tokens, rows of the batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kvpack.core.errors import UsageError
from kvpack.core.roles import Plane
from kvpack.core.types import State
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.plane import PlaneCache


class Revisions(ABC):
    """Cropping, for assisted generation, and choosing rows, for beams."""

    plan: KVLayerPlan
    exact_prefill: bool
    record_past: bool
    is_initialized: bool
    sliding_window: int | None
    batch_size: int
    device: torch.device
    _planes: dict[Plane, PlaneCache]
    _overlay: Overlay
    _memory: State

    @abstractmethod
    def get_seq_length(self) -> int:
        """Slots so far: padding and tokens out of the window included."""

    @abstractmethod
    def _window_start(self, length: int) -> int:
        """The oldest of `length` slots that the next token attends to."""

    @abstractmethod
    def _encode(self, needed: int) -> None:
        """Encode what leaves the tails; slots before `needed` are out of the window."""

    @abstractmethod
    def _drop(self) -> None:
        """Free what fell out of the sliding window."""

    def activate_past_recording(self) -> None:
        """Let tokens stay exact until `crop` is called, so that cropping leaves no trace.

        Raises:
            UsageError: the cache was made with ``exact_prefill=False``.
        """
        if not self.exact_prefill:
            raise UsageError(
                "a cache that quantises the prompt chunk cannot take tokens back without a trace",
                hint="use exact_prefill=True with assisted generation",
            )
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens; afterwards encode what a recording held back.

        Codes are never changed: tokens that were encoded stay encoded, those removed from the
        middle of a token block leave a hole, and new tokens begin a new block.

        Raises:
            UsageError: a positive count, or tokens that left the sliding window would be needed.
        """
        if tokens_to_remove > 0:
            raise UsageError(
                f"crop takes the negative number of tokens to remove, not {tokens_to_remove}",
                hint="crop(-n) removes the n newest tokens",
            )
        if not self.is_initialized:
            return
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if tokens_to_remove:
            self._check_croppable(length)
            for plane in self._planes.values():
                plane.crop(length)
            self._overlay.keep(0, length)
        if self.record_past:
            self._encode(self._window_start(length))
            self._drop()

    def _check_croppable(self, length: int) -> None:
        if self.sliding_window is None:
            return
        full = self.get_seq_length() >= self.sliding_window
        first = max(plane.first for plane in self._planes.values())
        if (full and not self.record_past) or (first > self._window_start(length) and length):
            raise UsageError(
                f"layer {self.plan.attention.layer}: tokens before the crop left the sliding window",
                hint="call activate_past_recording() before the tokens that may be removed",
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i of the batch what row ``beam_idx[i]`` was."""
        if self.is_initialized:
            for plane in self._planes.values():
                plane.select(beam_idx)
            self._overlay.select(beam_idx)
            for name, tensor in self._memory.items():
                self._memory[name] = tensor.index_select(0, beam_idx.to(tensor.device))
            self.batch_size = len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))
