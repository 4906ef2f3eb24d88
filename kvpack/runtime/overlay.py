"""Protected tokens: exact rows laid over the decoded ones."""

from __future__ import annotations

import torch
from torch import Tensor


class Overlay:
    """Original keys and values of protected tokens, ragged over the batch.

    Args:
        like: a key or value plane [B, K, T, D] whose dtype, device, K and D are taken.
    """

    def __init__(self, like: Tensor) -> None:
        _, heads, _, channels = like.shape
        self.rows = torch.empty(0, dtype=torch.int32, device=like.device)
        self.slots = torch.empty(0, dtype=torch.int32, device=like.device)
        self.keys = like.new_empty((0, heads, channels))
        self.values = like.new_empty((0, heads, channels))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of indices and rows."""
        held = (self.rows, self.slots, self.keys, self.values)
        return sum(t.numel() * t.element_size() for t in held)

    def add(self, chosen: Tensor, keys: Tensor, values: Tensor, first_slot: int) -> None:
        """Keep the tokens of an update that `chosen` [B, T] marks; the update begins at `first_slot`."""
        row, token = chosen.nonzero(as_tuple=True)
        if not len(row):
            return
        self.rows = torch.cat((self.rows, row.to(torch.int32)))
        self.slots = torch.cat((self.slots, (token + first_slot).to(torch.int32)))
        self.keys = torch.cat((self.keys, keys.detach()[row, :, token]))
        self.values = torch.cat((self.values, values.detach()[row, :, token]))

    def mask(self, batch: int, start: int, stop: int) -> Tensor | None:
        """Which of the slots `start` to `stop` are protected, bool [B, stop - start]; None if none."""
        inside = (self.slots >= start) & (self.slots < stop)
        if not len(self) or not bool(inside.any()):
            return None
        mask = torch.zeros((batch, stop - start), dtype=torch.bool, device=self.rows.device)
        mask[self.rows[inside].long(), self.slots[inside].long() - start] = True
        return mask

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Overwrite protected tokens in planes [B, K, T, D] whose first token is slot `start`."""
        if not len(self):
            return
        inside = (self.slots >= start) & (self.slots < start + keys.shape[2])
        row, token = self.rows[inside].long(), self.slots[inside].long() - start
        keys[row, :, token] = self.keys[inside]
        values[row, :, token] = self.values[inside]

    def older(self, slot: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Protected tokens before `slot`, side by side for each of `batch` rows.

        Returns:
            Keys and values [B, K, n, D] and their slots int64 [B, n] in ascending order; -1 and zeros
            where a row has fewer than n.
        """
        chosen = (self.slots < slot).nonzero().squeeze(-1)
        chosen = chosen[(self.rows[chosen].long() * (1 << 31) + self.slots[chosen]).argsort()]
        rows = self.rows[chosen].long()
        counts = rows.bincount(minlength=batch)
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        most = int(counts.max()) if len(rows) else 0
        slots = torch.full((batch, most), -1, dtype=torch.int64, device=rows.device)
        slots[rows, place] = self.slots[chosen].long()
        found = []
        for plane in (self.keys, self.values):
            dense = plane.new_zeros((batch, plane.shape[1], most, plane.shape[2]))
            dense[rows, :, place] = plane[chosen]
            found.append(dense)
        return found[0], found[1], slots

    def keep(self, first_slot: int, stop_slot: int) -> None:
        """Forget tokens outside of `first_slot` to `stop_slot`."""
        if len(self):
            inside = (self.slots >= first_slot) & (self.slots < stop_slot)
            if not bool(inside.all()):
                self._take(inside.nonzero().squeeze(-1), self.rows[inside])

    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        if len(self):
            same = index.to(self.rows.device).unsqueeze(1) == self.rows.unsqueeze(0)
            row, entry = same.nonzero(as_tuple=True)
            self._take(entry, row.to(torch.int32))

    def _take(self, entries: Tensor, rows: Tensor) -> None:
        self.rows = rows
        self.slots, self.keys, self.values = self.slots[entries], self.keys[entries], self.values[entries]
