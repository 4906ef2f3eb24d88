"""Attention over a compressed cache, block of tokens by block, with an online softmax.

Dense keys and values of the past never exist: a block's scores come from the codes where the codec
computes on them and the keys' transforms have a dual that can be applied to the query once; else
from the block's tokens, decoded and gone again. Sums of values are formed in the basis of the codes
and brought back once per step, because the transforms of values are linear.

    m' = max(m, max s),  l' = l e^(m-m') + sum e^(s-m'),  a' = a e^(m-m') + e^(s-m') V

Source of the recurrence: Milakov and Gimelshein, arXiv 1805.02867; over blocks of keys and values:
FlashAttention, arXiv 2205.14135, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpack import kernels
from kvpack.core.rows import Step, TokenRows, Turn
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.plane import PlaneCache
from kvpack.runtime.tier import Tier
from kvpack.runtime.tokens import TokenTrack

BLOCK_SCORES = 1 << 18
"""Scores that are held at a time, over all heads: 1 MB."""


@dataclass(frozen=True)
class Call:
    """What attention is asked: queries [B, H, T, D] of the newest T slots, and how scores are made.

    `mask` is additive or bool [B or 1, 1 or H, T, S] over the S slots that `update` announced, the
    newest last; None where every query reads everything up to itself. `softcap` bounds scores by
    ``softcap * tanh(score / softcap)``; `sinks` [H] are scores of a token without a value.
    """

    query: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


class _Running:
    """Maximum, sum of weights and weighted values of rows [B, K, M] so far.

    Values are kept apart where they are still in the basis of the codes.
    """

    def __init__(self, rows: Tensor) -> None:
        self.maximum = rows.new_full(rows.shape[:-1], -torch.inf)
        self.total = rows.new_zeros(rows.shape[:-1])
        self.values: dict[bool, Tensor] = {}

    def add(self, scores: Tensor, mix: Callable[[Tensor], tuple[Tensor, bool]]) -> None:
        """Take in scores [B, K, M, t], which are overwritten, and what `mix` makes of their weights."""
        maximum = torch.maximum(self.maximum, scores.amax(-1))
        # A row that has read nothing yet has no maximum to subtract.
        finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
        decay = torch.exp(self.maximum - finite)
        weights = scores.sub_(finite.unsqueeze(-1)).exp_()
        self.total = self.total * decay + weights.sum(-1)
        for held in self.values.values():
            held.mul_(decay.unsqueeze(-1))
        mixed, coded = mix(weights)
        self.values[coded] = self.values[coded] + mixed if coded in self.values else mixed
        self.maximum = maximum

    def add_sinks(self, scores: Tensor) -> None:
        """Take in one score [1, K, M] for every row that brings no value."""
        self.total = self.total + torch.exp(scores - self.maximum)


class _Plane:
    """Keys or values of a step: which stretch of slots lies where."""

    def __init__(self, plane: PlaneCache, track: TokenTrack) -> None:
        self.plane, self.track = plane, track

    def edges(self) -> Iterator[int]:
        """Slots at which tiers, runs of blocks and the tail begin."""
        slot = self.plane.boundary - self.plane.stored_tokens
        for tier in reversed(self.plane.tiers):
            for length in tier.store.lengths():
                yield slot
                slot += length
        yield self.plane.tail_start

    def tier_of(self, slot: int) -> tuple[Tier, int] | None:
        """The tier that holds a slot, and how many of its tokens are older; None for the tail."""
        if slot >= self.plane.boundary:
            return None
        first = self.plane.boundary - self.plane.stored_tokens
        for tier in reversed(self.plane.tiers):
            if slot < first + tier.tokens:
                return tier, slot - first
            first += tier.tokens
        return None

    def exact(self, start: int, stop: int) -> Tensor:
        """Slots of the tail, float32 [B, K, t, D]."""
        tail = self.plane.tail[:, :, start - self.plane.tail_start : stop - self.plane.tail_start]
        return tail.float()

    def rows(self, tier: Tier, skip: int, start: int, stop: int) -> tuple[TokenRows, int, int]:
        """Coded slots for loops that transform them back row by row; others before and behind them."""
        found, before, behind = tier.rows(skip, stop - start)
        steps: list[Step] = []
        heads = self.plane.tail.shape[1] // self.plane.coded_shape[1]
        for step in self._steps(start, stop):
            if isinstance(step, Turn) and before + behind:
                own, other = (pad(t, (0, 0, before, behind)) for t in (step.own, step.other))
                steps.append(Turn(own, other, step.partner))
            else:
                steps.append(step)
        return found._replace(steps=tuple(steps), heads=heads), before, behind

    def _steps(self, start: int, stop: int) -> Iterator[Step]:
        """How rows come back to the model's basis; what depends on positions is shared by all layers."""
        shape, found = tuple(self.plane.tail.shape), []
        for transform, state, site in self.plane.transforms:
            if transform.needs_rope:
                known, key = self.track.turns, (transform, site.rope, shape[3], start, stop)
                if key not in known:
                    at = replace(site, positions=self.track.positions_of(start, stop))
                    known[key] = transform.row_steps(state, at, shape[3])
                found.append(known[key])
            else:
                found.append(transform.row_steps(state, site, shape[3]))
            shape = transform.shape(shape)
        return (step for steps in reversed(found) for step in steps)

    def decoded(self, tier: Tier, skip: int, start: int, stop: int) -> Tensor:
        """Coded slots in the model's basis, float32 [B, K, t, D]."""
        x = tier.decode(skip, stop - start)
        positions = self.track.positions_of(start, stop)
        for transform, state, site in reversed(self.plane.transforms):
            x = transform.inverse(x, state, replace(site, positions=positions))
        return x


class _Keys(_Plane):
    """Scores of queries [B, K, M, D], which are scaled already."""

    def __init__(self, plane: PlaneCache, track: TokenTrack, query: Tensor) -> None:
        super().__init__(plane, track)
        self.query = query
        self.dual = self._dual()

    def _dual(self) -> Tensor | None:
        """The queries in the basis of the codes, None where there is no such thing."""
        if not self.plane.keeps_heads:
            return None
        query: Tensor | None = self.query
        for transform, state, site in self.plane.transforms:
            query = None if query is None else transform.dual(query, state, site)
        return query

    def scores(self, start: int, stop: int) -> Tensor:
        """[B, K, M, stop - start]."""
        found = self.tier_of(start)
        if found is None:
            return self.query @ self.exact(start, stop).mT
        tier, skip = found
        if self.dual is None and self.plane.in_rows:
            rows, before, _ = self.rows(tier, skip, start, stop)
            return kernels.rows.scores(self.query, rows)[..., before : before + stop - start]
        if self.dual is None:
            return self.query @ self.decoded(tier, skip, start, stop).mT
        return tier.scores(self.dual, skip, stop - start)


class _Values(_Plane):
    """Sums of values with weights [B, K, M, t], in the basis of the codes where that is possible."""

    def __init__(self, plane: PlaneCache, track: TokenTrack) -> None:
        super().__init__(plane, track)
        self.on_codes = plane.keeps_heads and all(t.linear for t, _, _ in plane.transforms)

    def mix(self, weights: Tensor, start: int, stop: int) -> tuple[Tensor, bool]:
        """[B, K, M, D], and whether it is still in the basis of the codes."""
        found = self.tier_of(start)
        if found is None:
            return weights @ self.exact(start, stop), False
        tier, skip = found
        if not self.on_codes and self.plane.in_rows:
            rows, before, behind = self.rows(tier, skip, start, stop)
            weights = pad(weights, (before, behind)) if before + behind else weights
            return kernels.rows.mix(weights, rows), False
        if not self.on_codes:
            return weights @ self.decoded(tier, skip, start, stop), False
        return tier.mix(weights, skip, stop - start), True

    def whole(self, found: Mapping[bool, Tensor]) -> Tensor:
        """All sums in the model's basis, together."""
        if True not in found:
            return found[False]
        x = found[True]
        for transform, state, site in reversed(self.plane.transforms):
            x = transform.inverse(x, state, replace(site, positions=None))
        return x + found[False] if False in found else x


class _Masks:
    """What queries may not read, as numbers that are added to scores."""

    def __init__(self, call: Call, overlay: Overlay, kv_heads: int, start: int, stop: int) -> None:
        self.start, self.overlay = start, overlay
        self.given = _by_rows(call, kv_heads, stop - start)
        self.hidden = overlay.mask(len(call.query), start, stop)

    def applied(self, scores: Tensor, begin: int, end: int) -> Tensor:
        """Scores [B, K, M, t] of slots; protected ones, which come by themselves, are left out."""
        place = slice(begin - self.start, end - self.start)
        if self.given is not None:
            scores = scores + self.given[..., place]
        if self.hidden is not None:
            scores.masked_fill_(self.hidden[:, None, None, place], -torch.inf)
        return scores

    def protected(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Exact keys and values [B, K, n, D] of protected slots, and their mask; None if there are none."""
        if self.hidden is None:
            return None
        keys, values, slots = self.overlay.older(self.start + self.hidden.shape[1], len(self.hidden))
        places = (slots - self.start).clamp(min=0)
        mask = torch.zeros_like(slots, dtype=torch.float32).masked_fill_(slots < self.start, -torch.inf)
        mask = mask[:, None, None]
        if self.given is not None:
            given = self.given.expand(len(slots), *self.given.shape[1:])
            index = places[:, None, None].expand(*given.shape[:3], -1)
            mask = mask + given.gather(-1, index)
        return keys, values, mask


def _by_rows(call: Call, kv_heads: int, slots: int) -> Tensor | None:
    """The mask as float32 [B or 1, K or 1, M or 1, S], None where everything may be read."""
    _, heads, tokens, _ = call.query.shape
    mask = call.mask
    if mask is None:
        if tokens == 1:
            return None
        late = torch.ones((tokens, slots), dtype=torch.bool, device=call.query.device)
        mask = late.tril(slots - tokens)[None, None]
    mask = mask[..., mask.shape[-1] - slots :]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    mask = mask.float()
    if mask.shape[1] == 1:
        if tokens == 1:
            return mask
        return mask.expand(-1, heads // kv_heads, -1, -1).flatten(1, 2).unsqueeze(1)
    return mask.expand(-1, heads, tokens, -1).reshape(mask.shape[0], kv_heads, -1, slots)


def attend(
    call: Call, keys: PlaneCache, values: PlaneCache, overlay: Overlay, track: TokenTrack, start: int
) -> Tensor:
    """Attention of the newest tokens over the slots from `start` on: [B, T, H, D], in the queries' dtype."""
    batch, heads, tokens, channels = call.query.shape
    kv_heads = keys.tail.shape[1]
    rows = call.query.float().mul(call.scaling).reshape(batch, kv_heads, -1, channels)
    key_side, value_side = _Keys(keys, track, rows), _Values(values, track)
    masks, running = _Masks(call, overlay, kv_heads, start, keys.length), _Running(rows)
    most = max(1, BLOCK_SCORES // (batch * heads * tokens))
    for begin, end in _blocks(start, keys.length, (*key_side.edges(), *value_side.edges()), most):
        scores = masks.applied(_capped(key_side.scores(begin, end), call.softcap), begin, end)
        running.add(scores, partial(value_side.mix, start=begin, stop=end))
    protected = masks.protected()
    if protected is not None:
        exact_keys, exact_values, mask = protected
        scores = _capped(rows @ exact_keys.float().mT, call.softcap) + mask
        running.add(scores, lambda weights: (weights @ exact_values.float(), False))
    if call.sinks is not None:
        running.add_sinks(call.sinks.float().reshape(1, kv_heads, -1).repeat_interleave(tokens, -1))
    total = running.total.unsqueeze(-1)
    # Where a query may read nothing at all the sums are zero, and stay so.
    out = value_side.whole(running.values) / total.masked_fill(total == 0, 1.0)
    return out.reshape(batch, heads, tokens, channels).transpose(1, 2).to(call.query.dtype).contiguous()


def _blocks(start: int, stop: int, edges: Iterable[int], most: int) -> Iterator[tuple[int, int]]:
    """Stretches of up to `most` slots that cross no edge."""
    inner = {edge for edge in edges if start < edge < stop}
    for first, last in pairwise(sorted({start, stop} | inner)):
        for begin in range(first, last, most):
            yield begin, min(last, begin + most)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
