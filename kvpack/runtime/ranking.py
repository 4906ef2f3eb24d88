"""Which tokens of a layer are important: their scores, and the tier that each encoded one is in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpack import ops
from kvpack.core.errors import UsageError
from kvpack.core.roles import TierPolicy
from kvpack.core.types import ScoreView, State
from kvpack.runtime.tokens import TokenTrack


@dataclass(frozen=True)
class Chunk:
    """Tokens whose tiers were decided together: `high` of them are in the first tier, for every head.

    `bits` is the packed mask of those, uint8 [B, K, ceil(tokens/8)].
    """

    tokens: int
    high: int
    bits: Tensor

    @classmethod
    def of(cls, mask: Tensor, high: int) -> Chunk:
        """A chunk from its mask, bool [B, K, T]."""
        return cls(mask.shape[-1], high, ops.bits.pack(mask.to(torch.uint8), 1))

    def mask(self) -> Tensor:
        """Tokens in the first tier, bool [B, K, T]."""
        return ops.bits.unpack(self.bits, 1, self.tokens).bool()

    def places(self, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens of both tiers in the order in which they are stored, int64 [B, K, high or the rest].

        In order of age, padding (where `valid` [B, T] is given) before all others, so that it stands
        at the same places for every head.
        """
        key = torch.where(self.mask(), 0, 2)
        if valid is not None:
            key = key + valid.unsqueeze(1)
        order = key.argsort(dim=-1, stable=True)
        return order[..., : self.high], order[..., self.high :]


class Ranking:
    """Scores and tiers of the tokens of one layer; its planes share them.

    The encoded slots `first` to `stop` lie in `chunks`. Without `TierPolicy.demote` every chunk that
    leaves the tail is decided once, and scores are forgotten then. With it there is one chunk that
    is decided anew at each step, `before` is what it was, and all scores are kept.

    Args:
        policy: one that has a scorer.
        heads: heads that the codecs see; scores of kv heads that were merged are added up.
    """

    def __init__(self, policy: TierPolicy, heads: int) -> None:
        if policy.scorer is None:
            raise UsageError(f"policy {type(policy).__name__} ranks no tokens", why="it has no scorer")
        self.policy, self.scorer, self.heads = policy, policy.scorer, heads
        self.first = self.stop = 0
        self.chunks: list[Chunk] = []
        self.before: Chunk | None = None
        self._observed: State = {}
        self._scored_from = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the masks and of the sums that scores are made from."""
        held = (*(chunk.bits for chunk in self.chunks), *self._observed.values())
        return sum(t.numel() * t.element_size() for t in held)

    @torch.inference_mode(False)
    def observe(self, view: ScoreView, length: int) -> None:
        """Let the scorer look at a forward pass after which there are `length` slots."""
        found = self.scorer.observe(view)
        for name, new in ((name, self._aligned(tensor, length)) for name, tensor in found.items()):
            old = self._observed.get(name)
            if old is not None:
                new[..., : old.shape[-1]] += old
            self._observed[name] = new

    def _aligned(self, tensor: Tensor, length: int) -> Tensor:
        """A tensor whose last axis are the newest slots, made to begin at the first scored one."""
        wanted = length - self._scored_from
        kept = tensor[..., max(0, tensor.shape[-1] - wanted) :]
        return torch.nn.functional.pad(kept, (wanted - kept.shape[-1], 0)).clone()

    def scores(self, start: int, stop: int) -> Tensor:
        """Scores of the slots `start` to `stop`, [B, heads, T].

        Raises:
            UsageError: they were not all scored.
        """
        held = next(iter(self._observed.values()), None)
        if held is None or not self._scored_from <= start <= stop <= self._scored_from + held.shape[-1]:
            raise UsageError(
                f"tokens {start} to {stop} cannot be ranked",
                why="the attention to them was never shown to the cache",
                hint="run the model that kvpack.load returned",
            )
        found = self.scorer.score(self._observed)[..., start - self._scored_from : stop - self._scored_from]
        if found.shape[1] == 1:
            return found.expand(-1, self.heads, -1)
        return torch.unflatten(found, 1, (self.heads, -1)).sum(2)

    @torch.inference_mode(False)
    def admit(self, start: int, stop: int, needed: int, tokens: TokenTrack) -> None:
        """Decide the tiers of the slots `start` to `stop`, which leave the tail now.

        `start` lies behind `stop` of the last time only where slots in between are useless, and
        then older ones are, too. Slots before `needed` are out of the window.
        """
        if start == stop:
            self.chunks, self.first, self.stop = [], stop, stop
            self._forget(stop)
            return
        if start > self.stop or not self.chunks:
            self.chunks, self.first = [], start
        kept, candidates = start, None
        self.before = self.chunks[0] if self.policy.demote and self.chunks else None
        if self.before is not None:
            self.first, gone = max(self.first, needed), max(0, needed - self.first)
            kept, candidates = self.first, self.before.mask()[..., gone:]
        scores = self.scores(kept, stop)
        new = torch.ones((*scores.shape[:2], stop - start), dtype=torch.bool, device=scores.device)
        candidates = new if candidates is None else torch.cat((candidates, new), -1)
        chunk = self._decide(scores, candidates, tokens.valid_of(kept, stop))
        self.chunks = [chunk] if self.policy.demote else [*self.chunks, chunk]
        self.stop = stop
        self._forget(self.first if self.policy.demote else stop)

    def _decide(self, scores: Tensor, candidates: Tensor, valid: Tensor | None) -> Chunk:
        if valid is None:
            valid = candidates.new_ones((scores.shape[0], scores.shape[-1]))
        mask = self.policy.choose(scores, candidates, valid)
        high = int(self.policy.important(valid.sum(-1)).max())
        # Rows with fewer tokens than others fill both tiers with padding.
        missing = high - mask.sum(-1)[:, :1]
        filler = ~valid & ((~valid).long().cumsum(-1) <= missing)
        return Chunk.of(mask | filler.unsqueeze(1), high)

    def places(self, tokens: TokenTrack) -> tuple[Tensor, Tensor]:
        """Slots (counted from `first`) of both tiers in stored order, int64 [B, heads, n]."""
        found, start = [], self.first
        for chunk in self.chunks:
            valid = None if self.policy.demote else tokens.valid_of(start, start + chunk.tokens)
            found.append([index + (start - self.first) for index in chunk.places(valid)])
            start += chunk.tokens
        high, low = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
        return high, low

    def expired(self, needed: int) -> list[Chunk]:
        """The oldest chunks that lie before slot `needed` as a whole; none that are decided anew."""
        gone, start = [], self.first
        for chunk in () if self.policy.demote else self.chunks:
            start += chunk.tokens
            if start > needed:
                break
            gone.append(chunk)
        return gone

    def drop(self, needed: int, tail_start: int) -> None:
        """Forget what `expired` tells, and scores of slots that were dropped from the tail."""
        gone = self.expired(needed)
        self.chunks = self.chunks[len(gone) :]
        self.first += sum(chunk.tokens for chunk in gone)
        self._forget(self.first if self.policy.demote and self.chunks else tail_start)

    @torch.inference_mode(False)
    def _forget(self, slot: int) -> None:
        """Forget the scores before a slot."""
        gone = max(0, slot - self._scored_from)
        self._observed = {n: t[..., gone:].clone() for n, t in self._observed.items()}
        self._scored_from += gone

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row `index[i]` was."""
        self.chunks = [
            Chunk(c.tokens, c.high, c.bits.index_select(0, index.to(c.bits.device))) for c in self.chunks
        ]
        self._observed = {n: t.index_select(0, index.to(t.device)) for n, t in self._observed.items()}
