"""Rows of a batch: padding, and rows that move, multiply and go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.runtime.schemes import text


def padded(ids: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Two rows: another text of full length, and `ids` behind `pad` padding tokens; and their mask."""
    other = text(ids.shape[1] + pad, seed=8)
    row = torch.cat((torch.full((1, pad), 2), ids), 1)
    mask = torch.ones(2, row.shape[1], dtype=torch.long)
    mask[1, :pad] = 0
    return torch.cat((other, row)), mask


def generated(model: Any, ids: Tensor, mask: Tensor | None = None, tokens: int = 20) -> tuple[Tensor, Any]:
    """Logits [tokens, V] with which the last row goes on, and the cache."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack([step[-1] for step in out.logits]), out.past_key_values


ROW_CHANGES = {
    "reorder": [2, 0, 1],
    "lose": [1, 1, 0],
    "select": [2, 1],
    "mask": [0, 2],
    "repeat": [0, 0, 1, 1, 2, 2],
}


def change_rows(cache: Any, change: str) -> list[int]:
    """Do what a beam search does to a cache of three rows; which row each of the new ones was."""
    index = ROW_CHANGES[change]
    if change in ("reorder", "lose"):
        cache.reorder_cache(torch.tensor(index))
    elif change == "select":
        cache.batch_select_indices(torch.tensor(index))
    elif change == "mask":
        cache.batch_select_indices(torch.tensor([row in index for row in range(3)]))
    else:
        cache.batch_repeat_interleave(2)
    return index
