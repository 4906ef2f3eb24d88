"""Keys or values of one layer of which tokens fall to a lower tier as they lose importance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvpack.core.types import Payload, Site, State
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.runtime.ranked import RankedPlane
from kvpack.runtime.ranking import Ranking
from kvpack.runtime.tier import Tier
from kvpack.runtime.tokens import TokenTrack

Pool = dict[str, Tensor]
"""Payload tensors [B, K, n, *] with one row per token, in order of age."""


class DemotingPlane(RankedPlane):
    """A plane whose ranking is decided anew at each step.

    Tokens that leave the first tier are decoded and encoded by the second codec; all others keep
    their codes, which are moved within the pools. The codecs must encode every token by itself,
    into one row of each payload tensor.

    Arguments as of `RankedPlane`.
    """

    def __init__(
        self, plan: PlanePlan, ranking: Ranking, block: int, states: Sequence[State], site: Site, like: Tensor
    ) -> None:
        super().__init__(plan, ranking, block, states, site, like)
        self._encoded = 0
        self._clear()

    @property
    def stored_tokens(self) -> int:
        """Tokens held in encoded form."""
        return sum(_length(pool) for pool in self._pools)

    @property
    def encoded_tokens(self) -> int:
        """Tokens ever encoded; one that is demoted counts again where every head demotes one."""
        return self._encoded

    @torch.inference_mode(False)
    def _clear(self) -> None:
        empty = self._like_coded(0)
        self._pools = [self._rows_of(tier, empty) for tier in self.tiers]

    def _rows_of(self, tier: Tier, x: Tensor) -> Pool:
        """Payload rows of tokens [B, K, T, D]."""
        specs = tier.codec.spec(tuple(x.shape), str(self.tail.dtype).removeprefix("torch."))
        if not x.shape[2]:
            return {
                n: torch.empty(s.shape, dtype=getattr(torch, s.dtype), device=x.device)
                for n, s in specs.items()
            }
        parts = [tier.codec.encode(p, tier.state).tensors for p in torch.split(x, self._piece_tokens, 2)]
        wanted = {n: getattr(torch, s.dtype) for n, s in specs.items()}
        return {n: torch.cat([p[n] for p in parts], 2).to(dtype) for n, dtype in wanted.items()}

    @torch.inference_mode(False)
    def _admit(self, x: Tensor, start: int, stop: int, tokens: TokenTrack) -> None:
        """Refill both pools as the ranking now is; `x` [B, K, T, D] are the slots `start` to `stop`."""
        x = x.clone()
        now = self.ranking.chunks[0]
        fresh = torch.arange(stop - start, device=x.device).expand(*x.shape[:2], -1)
        if self.ranking.before is None:
            self._clear()
            was = torch.zeros((*x.shape[:2], 0), dtype=torch.bool, device=x.device)
        else:
            was = self.ranking.before.mask()
        gone = was.shape[-1] - (now.tokens - (stop - start))
        held = [_length(pool) for pool in self._pools]
        lost = was & ~torch.cat((was.new_zeros((*was.shape[:2], gone)), now.mask()), -1)[..., : was.shape[-1]]
        lost[..., :gone] = False
        demoted = self._demoted(was, lost)
        # Where each slot's row is found in [pool, demoted, new].
        high = torch.cat(((was.cumsum(-1) - 1).clamp(min=0), held[0] + fresh), -1)
        low = torch.where(lost, held[1] + lost.cumsum(-1) - 1, ((~was).cumsum(-1) - 1).clamp(min=0))
        low = torch.cat((low, held[1] + _length(demoted) + fresh), -1)
        for i, (source, between) in enumerate(((high, {}), (low, demoted))):
            rows = source[..., gone:].gather(-1, now.places(None)[i])
            new = self._rows_of(self.tiers[i], x)
            self._pools[i] = _gathered([p for p in (self._pools[i], between, new) if p], rows)
        self._encoded += stop - start + _length(demoted)

    def _demoted(self, was: Tensor, lost: Tensor) -> Pool:
        """Rows for the second tier of tokens that the first one loses, those of a head in order of age.

        Heads that lose fewer tokens than others have rows that nobody asks for behind their own.
        """
        most = int(lost.sum(-1).max()) if lost.numel() else 0
        if not most:
            return {}
        slots = (~lost).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
        rows = (was.cumsum(-1) - 1).clamp(min=0).gather(-1, slots)
        source = _gathered([self._pools[0]], rows)
        shape = (*self.coded_shape[:2], most, self.coded_shape[3])
        x = self.tiers[0].codec.decode(Payload(source, shape), self.tiers[0].state, torch.float32)
        return self._rows_of(self.tiers[1], x)

    def _decoded(self, index: int) -> Iterator[Tensor]:
        """The pool of a tier in pieces [B, K, t, D]."""
        tier, pool = self.tiers[index], self._pools[index]
        for start in range(0, _length(pool), self._piece_tokens):
            length = min(self._piece_tokens, _length(pool) - start)
            part = {name: t.narrow(2, start, length) for name, t in pool.items()}
            shape = (*self.coded_shape[:2], length, self.coded_shape[3])
            yield tier.codec.decode(Payload(part, shape), tier.state, self._decoded_dtype)

    def drop(self, needed: int) -> None:
        """Give up the tail before slot `needed`; the pools give up theirs when they are refilled."""
        self._drop_tail(needed)

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        super().select(index)
        self._pools = [
            {n: t.index_select(0, index.to(t.device)) for n, t in pool.items()} for pool in self._pools
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the exact tail."""
        return super().nbytes + sum(
            t.numel() * t.element_size() for pool in self._pools for t in pool.values()
        )

    @property
    def allocated_nbytes(self) -> int:
        """The same: pools have no room to grow."""
        return self.nbytes


def _length(pool: Pool) -> int:
    return next((t.shape[2] for t in pool.values()), 0)


def _gathered(pools: Sequence[Pool], rows: Tensor) -> Pool:
    """The rows [B, K, n] of pools that stand one behind another."""
    found = {}
    for name, first in pools[0].items():
        joined = torch.cat([_bytes(pool[name]) for pool in pools], 2)
        found[name] = joined.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, joined.shape[-1])).view(
            first.dtype
        )
    return found


def _bytes(tensor: Tensor) -> Tensor:
    """The same numbers in a dtype that torch can gather: it cannot gather some one-byte floats."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
