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
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kvpack.kernels import choice
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.plane import PlaneCache
from kvpack.runtime.sides import Keys, Values, pieces
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

    def add(self, scores: Tensor, mix: Callable[[Tensor], Mapping[bool, Tensor]]) -> None:
        """Take in scores [B, K, M, t], which are overwritten, and what `mix` makes of their weights."""
        maximum = torch.maximum(self.maximum, scores.amax(-1))
        # A row that has read nothing yet has no maximum to subtract.
        finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
        decay = torch.exp(self.maximum - finite)
        weights = scores.sub_(finite.unsqueeze(-1)).exp_()
        self.total = self.total * decay + weights.sum(-1)
        for held in self.values.values():
            held.mul_(decay.unsqueeze(-1))
        self._add_values(mix(weights))
        self.maximum = maximum

    def _add_values(self, found: Mapping[bool, Tensor]) -> None:
        for coded, values in found.items():
            self.values[coded] = self.values[coded] + values if coded in self.values else values

    def join(self, values: Tensor, maximum: Tensor, total: Tensor) -> None:
        """Take in weighted values [B, K, M, D] in the basis of the codes, with their maxima and sums."""
        highest = torch.maximum(self.maximum, maximum)
        finite = highest.masked_fill(highest == -torch.inf, 0.0)
        before, now = torch.exp(self.maximum - finite), torch.exp(maximum - finite)
        self.total = self.total * before + total * now
        for held in self.values.values():
            held.mul_(before.unsqueeze(-1))
        self._add_values({True: values * now.unsqueeze(-1)})
        self.maximum = highest

    def add_sinks(self, scores: Tensor) -> None:
        """Take in one score [1, K, M] for every row that brings no value."""
        self.total = self.total + torch.exp(scores - self.maximum)


class _Masks:
    """What queries may not read, as numbers that are added to scores."""

    def __init__(self, call: Call, overlay: Overlay, kv_heads: int, start: int, stop: int) -> None:
        self.start, self.overlay = start, overlay
        self.batch, self.device = len(call.query), call.query.device
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

    def of_tokens(self, begin: int, end: int) -> Tensor | Literal[False] | None:
        """The mask of slots [B, t]; None where there is none, False where queries of a row differ."""
        if self.given is not None and self.given.shape[1:3].numel() > 1:
            return False
        if self.given is None and self.hidden is None:
            return None
        empty = torch.zeros((self.batch, 1, 1, end - begin), device=self.device)
        return self.applied(empty, begin, end)[:, 0, 0].contiguous()

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
    kv_heads = keys.tail_shape[1]
    rows = call.query.float().mul(call.scaling).reshape(batch, kv_heads, -1, channels)
    key_side, value_side = Keys(keys, track, rows), Values(values, track)
    masks, running = _Masks(call, overlay, kv_heads, start, keys.length), _Running(rows)
    rest = []
    for begin, end in pieces(start, keys.length, key_side.edges | value_side.edges):
        found = _together(call, key_side, value_side, masks, begin, end)
        if found is not None:
            running.join(*found)
        else:
            rest.append((begin, end))
    for begin, end in _blocks(rest, max(1, BLOCK_SCORES // (batch * heads * tokens))):
        scores = masks.applied(_capped(key_side.scores(begin, end), call.softcap), begin, end)
        running.add(scores, partial(value_side.mix, start=begin, stop=end))
    protected = masks.protected()
    if protected is not None:
        exact_keys, exact_values, mask = protected
        scores = _capped(rows @ exact_keys.float().mT, call.softcap) + mask
        running.add(scores, lambda weights: {False: weights @ exact_values.float()})
    if call.sinks is not None:
        running.add_sinks(call.sinks.float().reshape(1, kv_heads, -1).repeat_interleave(tokens, -1))
    total = running.total.unsqueeze(-1)
    # Where a query may read nothing at all the sums are zero, and stay so.
    out = value_side.whole(running.values) / total.masked_fill(total == 0, 1.0)
    return out.reshape(batch, heads, tokens, channels).transpose(1, 2).to(call.query.dtype).contiguous()


def _together(
    call: Call, keys: Keys, values: Values, masks: _Masks, begin: int, end: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Weighted values, maxima and sums of weights from one kernel; None where there is none for it."""
    if keys.dual is None or not values.on_codes:
        return None
    key, value, mask = keys.coded(begin, end), values.coded(begin, end), masks.of_tokens(begin, end)
    if key is None or value is None or key.before != value.before or mask is False:
        return None
    query = keys.dual.to(call.query.dtype) if choice.on_gpu(call.query) else keys.dual
    return key.codec.attend(
        query, key.payload, value.codec, value.payload, key.before, end - begin, mask, call.softcap
    )


def _blocks(stretches: Iterable[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """The same slots in blocks of up to `most`; stretches that touch are one."""
    joined: list[tuple[int, int]] = []
    for start, stop in stretches:
        touches = joined and joined[-1][1] == start
        joined.append((joined.pop()[0] if touches else start, stop))
    for start, stop in joined:
        for begin in range(start, stop, most):
            yield begin, min(stop, begin + most)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
