"""The cache of a layer that drops tokens which the model would read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpack.core.errors import UsageError
from kvpack.runtime.layer import KVPackLayer
from kvpack.runtime.retrieval import additive


class NarrowedLayer(KVPackLayer):
    """Queries read protected tokens and the newest of the policy's window, see `TierPolicy.window`.

    `update` returns protected tokens that are older than the window, row by row side by side, and
    behind them one run of slots. transformers makes masks for one run only, so that `attend` replaces
    the mask by one of this layer's own, from slots, wherever that makes a difference.

    Arguments as of `KVPackLayer`.
    """

    _slots: Tensor
    _unmasked = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `KVPackLayer.update`, protected tokens before the window in front.

        Raises:
            UsageError: also when the last pass did not ask this layer for its mask.
        """
        if self._unmasked:
            raise UsageError(
                f"layer {self.plan.attention.layer}: attention did not ask the cache what it may read",
                why="the recipe drops tokens that the model would read",
                hint="keep the attention implementation with which kvpack.load returned the model",
            )
        held = super().update(key_states, value_states, *args, **kwargs)
        self._unmasked = True
        return held

    def _read(self, start: int, past: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVPackLayer._read`, behind protected tokens before `start`."""
        keys, values = super()._read(start, past, *new)
        batch, _, tokens, _ = keys.shape
        first_keys, first_values, slots = self._overlay.older(start, batch)
        run = torch.arange(start, start + tokens, device=slots.device)
        self._slots = torch.cat((slots, run.expand(batch, -1)), 1)
        if not slots.shape[1]:
            return keys, values
        return torch.cat((first_keys, keys), 2), torch.cat((first_values, values), 2)

    @property
    def sees_attention(self) -> bool:
        """Always."""
        return True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The same keys and values, with the mask of what is read; see `KVPackLayer.attend`."""
        self._unmasked = False
        tokens, length, window = query.shape[2], self.get_seq_length(), self.plan.window
        if window is None or length <= window:
            return None
        slots, valid = self._slots, self.track.valid_of(0, length)
        if tokens == 1 and valid is None and not self.is_sliding and bool((slots >= 0).all()):
            return key, value, None
        queries = torch.arange(length - tokens, length, device=slots.device).unsqueeze(1)
        distance = queries - slots[:, None]
        read = (distance >= 0) & (slots >= 0)[:, None]
        read &= (distance < window) | self._protected(slots)[:, None]
        if self.plan.attention.window is not None:
            read &= distance < self.plan.attention.window
        if valid is not None:
            read &= valid.to(slots.device).gather(1, slots.clamp(min=0))[:, None]
        return key, value, additive(read.unsqueeze(1), query.dtype)

    def _protected(self, slots: Tensor) -> Tensor:
        """Which of the slots [B, S] are protected, bool [B, S]."""
        found = self._overlay.mask(len(slots), 0, self.get_seq_length())
        if found is None:
            return torch.zeros_like(slots, dtype=torch.bool)
        return found.gather(1, slots.clamp(min=0))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what `update` will return, and a first slot as if it were one run."""
        length, start = super().get_mask_sizes(query_length)
        if not self.is_initialized:
            return length, start
        protected = self._overlay.older(start, self.batch_size)[2].shape[1]
        return length + protected, start - protected

    def _drop(self) -> None:
        """Free what fell out of the window; protected tokens stay."""
        needed = self._window_start(self.get_seq_length())
        for plane in self._planes.values():
            plane.drop(needed)

    def reset(self) -> None:
        """Forget everything; the next update begins anew."""
        super().reset()
        self._unmasked = False
