"""The cache of a layer whose queries read chosen tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from kvpack.core.types import Rope, Site, State
from kvpack.models.attention_interface import visible
from kvpack.recipe.kv_plan import KVLayerPlan, RetrievalPlan
from kvpack.runtime.index import Index
from kvpack.runtime.layer import KVPackLayer
from kvpack.runtime.tokens import TokenTrack

LONGEST_STEP = 32
"""Queries of a forward pass up to which they choose; longer ones are prompts and read everything."""


class RetrievalLayer(KVPackLayer):
    """Keys and values as their plan stores them, and an index that says which of them to read.

    Prompts are dense and exact. In short steps, and everywhere with ``exact_prefill=False``, each
    query head attends to what the retriever chooses by the index's scores, and to that exactly:
    through a mask, or, where keys and values are kept on the CPU, to the union of what the heads of
    a kv head chose, which alone is fetched. Source: A2ATS, arXiv 2502.12665.

    Arguments as of `KVPackLayer`; `states` also holds those of "index".
    """

    def __init__(
        self,
        plan: KVLayerPlan,
        retrieval: RetrievalPlan,
        states: Mapping[str, tuple[State, ...]],
        rope: Rope | None,
        track: TokenTrack,
        *,
        exact_prefill: bool = True,
    ) -> None:
        self.on_cpu = retrieval.residency == "cpu"
        self._tokens, self._index_plan, self.retriever = track, retrieval.index, retrieval.retriever
        kept = cast(TokenTrack, _CpuTrack(track)) if self.on_cpu else track
        super().__init__(plan, states, rope, kept, exact_prefill=exact_prefill)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, dtype and device from the first keys and values [B, K, T, D]."""
        likes = (self._home(x[:, :, :0]) for x in (key_states, value_states))
        super().lazy_initialization(*likes)
        site = Site(self.plan.attention.layer, self._rope, None, key_states.shape[1])
        self.index = Index(self._index_plan, self._states["index"], site, key_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `KVPackLayer.update`; what is kept on the CPU comes back there, for `attend`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.get_seq_length() == 0
        held = super().update(self._home(key_states), self._home(value_states), *args, **kwargs)
        self.index.append(key_states, self._tokens)
        return (key_states, value_states) if first and self.exact_prefill else held

    def _home(self, x: Tensor) -> Tensor:
        return x.cpu() if self.on_cpu else x

    @property
    def sees_attention(self) -> bool:
        """Always."""
        return True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The chosen tokens, by mask or by themselves."""
        if not self.chooses(query, key):
            return key.to(query.device), value.to(query.device), mask
        read = self.chosen(query, visible(mask, query, key), scaling)
        if self.on_cpu and query.shape[2] <= LONGEST_STEP:
            return gathered(query, key, value, read)
        return key.to(query.device), value.to(query.device), additive(read, query.dtype)

    def chooses(self, query: Tensor, key: Tensor) -> bool:
        """Whether queries [B, H, T, D] read less than all keys [B, K, S, D]."""
        if self.exact_prefill and query.shape[2] > LONGEST_STEP:
            return False
        return self.retriever.most(key.shape[2]) < key.shape[2]

    def chosen(self, query: Tensor, seen: Tensor, scaling: float) -> Tensor:
        """Which tokens each query head reads, bool [B, H, T, S], of those that it can see."""
        select = self.retriever.select
        rows = [select(found * scaling, seen[:, :, part]) for part, found in self.scores(query)]
        return torch.cat(rows, 2)

    def scores(self, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Approximate scores of queries [B, H, T, D] with all tokens, see `Index.scores`."""
        return self.index.scores(query, self._tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """As `KVPackLayer.crop`."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self.index.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i of the batch what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        if self.is_initialized:
            self.index.select(beam_idx)

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored, and of the index."""
        return super().nbytes + (self.index.nbytes if self.is_initialized else 0)

    @property
    def allocated_nbytes(self) -> int:
        """The same with the room to grow."""
        return super().allocated_nbytes + (self.index.allocated_nbytes if self.is_initialized else 0)

    @property
    def device_nbytes(self) -> int:
        """Bytes on the model's device: without keys and values where these are kept on the CPU."""
        return self.nbytes - (super().nbytes if self.on_cpu else 0)


class _CpuTrack:
    """What a layer asks of a `TokenTrack`, with tensors on the CPU."""

    def __init__(self, track: TokenTrack) -> None:
        self._track = track

    def __getattr__(self, name: str) -> Any:
        return getattr(self._track, name)

    def positions_of(self, start: int, stop: int) -> Tensor | None:
        found = self._track.positions_of(start, stop)
        return None if found is None else found.cpu()

    def valid_of(self, start: int, stop: int) -> Tensor | None:
        found = self._track.valid_of(start, stop)
        return None if found is None else found.cpu()

    def seen(self, device: torch.device) -> Tensor:
        found = self._track.seen(device)
        return found.to(device)


def additive(read: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that every attention function takes: 0 where tokens are read, else the least number."""
    mask = torch.full(read.shape, torch.finfo(dtype).min, dtype=dtype, device=read.device)
    return mask.masked_fill_(read, 0.0)


def gathered(query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fetch the tokens that any head of a kv head reads, and mask them for each.

    Args:
        query: [B, H, T, D].
        key: [B, K, S, D], wherever it is kept.
        value: the same.
        read: bool [B, H, T, S].

    Returns:
        Keys and values [B, K, M, D] on the queries' device, oldest first, and an additive mask
        [B, H, T, M]; M is the largest union.
    """
    grouped = torch.unflatten(read, 1, (key.shape[1], -1))
    union = grouped.any(3).any(2)
    most = int(union.sum(-1).max())
    slots = union.byte().sort(dim=-1, descending=True, stable=True).indices[..., :most]
    wanted = slots[:, :, None, None].expand(*grouped.shape[:4], most)
    mask = additive(grouped.gather(-1, wanted).flatten(1, 2), query.dtype)
    places = slots.to(key.device).unsqueeze(-1)
    key, value = (x.gather(2, places.expand(-1, -1, -1, x.shape[3])) for x in (key, value))
    return key.to(query.device), value.to(query.device), mask
