"""Attention over the codes is attention over what they decode to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpack.core.roles import Codec, TierPolicy, Transform
from kvpack.core.types import Group, Rope
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.policies.age_staircase import AgeStaircase
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.parts.transforms.channel_reorder import ChannelReorder
from kvpack.parts.transforms.hadamard import Hadamard
from kvpack.parts.transforms.merge_heads import MergeHeads
from kvpack.parts.transforms.unrope import Unrope
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.runtime.attention import Call
from kvpack.runtime.cache import KVPackCache, KVScheme
from tests.runtime.rows import ROW_CHANGES, change_rows
from tests.runtime.schemes import attention_of, tiny

KEY = Affine(bits=4, group=Group("token", 32))
VALUE = Affine(bits=4, group=Group("channel", 32))
SPEC = attention_of(tiny(num_hidden_layers=1))[0]


@dataclass(frozen=True)
class Turning(Rope):
    """Halves of a head turn against each other; shares no code with the models."""

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        return self._turn(x, positions, 1.0)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        return self._turn(x.float(), positions, -1.0)

    def partners(self, channels: int) -> Tensor:
        return torch.arange(channels).roll(channels // 2)

    def _turn(self, x: Tensor, positions: Tensor, sign: float) -> Tensor:
        half = x.shape[-1] // 2
        angle = sign * positions[:, None, :, None] * 0.3 ** torch.arange(half)
        first, second = x.split(half, -1)
        turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        return torch.cat(turned, -1).to(x.dtype)


@dataclass(frozen=True)
class Case:
    """One layer of a cache and what it is given."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None
    key: tuple[Codec, ...] = (KEY,)
    value: tuple[Codec, ...] = (VALUE,)
    key_transforms: tuple[Transform, ...] = ()
    value_transforms: tuple[Transform, ...] = ()
    policy: TierPolicy = field(default_factory=lambda: SinkRecent(recent_tokens=32))
    dtype: torch.dtype = torch.float32
    batch: int = 1
    pad: int = 0
    exact_prefill: bool = True

    def plan(self) -> KVLayerPlan:
        attention = replace(
            SPEC,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            window=self.window,
            kind="full" if self.window is None else "sliding",
        )
        planes = []
        for transforms, codecs in (
            (self.key_transforms, self.key),
            (self.value_transforms, self.value),
        ):
            states = []
            shape: tuple[int, ...] = (1, self.kv_heads, 1, self.head_dim)
            for transform in transforms:
                states.append(transform.state_spec(shape))
                shape = transform.shape(shape)
            states += [codec.state_spec(shape) for codec in codecs]
            planes.append(PlanePlan(transforms, False, codecs, tuple(states)))
        return KVLayerPlan(attention, *planes, self.policy)

    def cache(self) -> KVPackCache:
        plan = self.plan()
        made = {}
        for name, spec in plan.state_tensors().items():
            generator = torch.Generator().manual_seed(len(name))
            made[name] = (
                torch.randperm(spec.elements, generator=generator).to(torch.int32).reshape(spec.shape)
            )
        return KVPackCache(KVScheme((plan,), made, {0: Turning()}), exact_prefill=self.exact_prefill)


@dataclass
class Pair:
    """Two caches that are given the same: one is read by codes, one as dense keys and values.

    The dense one is float32, also where the numbers are bfloat16: the codes are the same, but decoded
    keys and values are not rounded once more, as the portable path rounds them to the model's dtype.
    """

    case: Case
    seed: int = 0

    def __post_init__(self) -> None:
        self.caches = (self.case.cache(), self.case.cache())
        self.generator = torch.Generator().manual_seed(self.seed)
        self.batch, self.slots, self.mask = (
            self.case.batch,
            0,
            torch.ones(self.case.batch, 0, dtype=torch.bool),
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.case.dtype)

    def step(self, tokens: int, **asked: Any) -> tuple[Tensor, Tensor] | None:
        """Give `tokens` tokens to both; what both say, None where the codes are not read."""
        case = self.case
        keys, values = (self.random(self.batch, case.kv_heads, tokens, case.head_dim) * 2 for _ in range(2))
        query = self.random(self.batch, case.heads, tokens, case.head_dim)
        slots = torch.arange(self.slots, self.slots + tokens)
        new = (slots >= case.pad) | (torch.arange(self.batch) != self.batch - 1)[:, None]
        self.mask = torch.cat((self.mask, new), 1)
        self.slots += tokens
        for cache, routed in zip(self.caches, (True, False), strict=True):
            cache.begin(self.batch, tokens, self.mask if case.pad else None)
            cache.track.locate(slots[None])
            layer = cache.layers[0]
            layer.routed = routed
            held = layer.update(*((keys, values) if routed else (keys.float(), values.float())))
            size, start = held[0].shape[2], self.slots - held[0].shape[2]
            if routed and layer._unread is not None:
                size, start = self.slots - layer._unread, layer._unread
            given = self._given(start, size, tokens)
            call = Call(query.float(), given, case.head_dim**-0.5, **asked)
            if routed:
                ours = layer.attention(call)
        return None if ours is None else (ours, portable(call, *held))

    def _given(self, start: int, size: int, tokens: int) -> Tensor | None:
        """The mask that a model would make, bool [B, 1, T, S]."""
        slot = torch.arange(start, start + size)
        new = torch.arange(self.slots - tokens, self.slots)[:, None]
        seen = slot <= new
        if self.case.window is not None:
            seen = seen & (new - slot < self.case.window)
        seen = seen[None, None] & self.mask[:, None, None, start:]
        return None if tokens == 1 and bool(seen.all()) else seen


def portable(call: Call, keys: Tensor, values: Tensor) -> Tensor:
    """Attention in float64 over dense keys and values [B, K, S, D], softmax written out."""
    repeat = call.query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(repeat, 1) for t in (keys, values))
    scores = call.query.double() @ keys.mT * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.mask is not None:
        mask = call.mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if call.sinks is not None:
        extra = call.sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, extra), -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : keys.shape[2]]
    return (weights @ values).transpose(1, 2)


def check(pair: Pair, steps: Sequence[int], read: int, **asked: Any) -> None:
    """Feed both caches; at least `read` steps must be read by codes, and agree."""
    found = [outs for outs in (pair.step(tokens, **asked) for tokens in steps) if outs is not None]
    assert len(found) >= read
    for ours, expected in found:
        assert ours.shape == expected.shape
        live = pair.mask[:, -expected.shape[1] :, None, None]
        difference = ((ours.double() - expected) * live).abs().max() / (expected * live).abs().max()
        assert difference <= 1e-5


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MERGED = (Hadamard(heads=4), ChannelReorder())
ROTATED = {
    "plain": Case(policy=SinkRecent(recent_tokens=0)),
    "tokens": Case(key=(replace(VALUE, bits=2),), value=(replace(KEY, bits=2),)),
    "hadamard": Case(key_transforms=(Hadamard(),), value_transforms=(Hadamard(),)),
    "merged": Case(key_transforms=(MergeHeads(),), value_transforms=(MergeHeads(),)),
    "unrope": Case(key_transforms=(Unrope(),)),
    "rotatekv": Case(key=(VALUE,), key_transforms=(Unrope(), *MERGED), value_transforms=MERGED),
    "segments": Case(key=(Affine(bits=4, group=Group("token", 0)),), value=(replace(VALUE, zero="none"),)),
}
"""Ways to store keys and values."""

STAIRS = Case(
    key=tuple(replace(KEY, bits=bits) for bits in (8, 4, 2)),
    value=(Identity(), *(replace(VALUE, bits=bits) for bits in (4, 2))),
    policy=AgeStaircase(stair_tokens=32, sink_tokens=2),
)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 128, 129, 1000, 4097])
def test_every_length(tokens: int, dtype: torch.dtype) -> None:
    policy = SinkRecent(recent_tokens=0)
    check(Pair(Case(dtype=dtype, policy=policy)), [tokens, 1, 1], 2)


@DTYPES
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128])
def test_every_shape_of_heads(head_dim: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Groups of 1, 4 and 8 query heads."""
    check(Pair(Case(8, kv_heads, head_dim, dtype=dtype)), [150, 1, 1], 2)


@pytest.mark.parametrize("way", ROTATED)
@pytest.mark.parametrize("head_dim", [8, 80])
def test_every_way_to_store(way: str, head_dim: int) -> None:
    case = replace(ROTATED[way], head_dim=head_dim, batch=2, pad=9)
    check(Pair(case), [140, 1, 3, 1], 3)


@pytest.mark.parametrize("way", ROTATED)
@pytest.mark.parametrize("exact_prefill", [True, False])
def test_windows(way: str, exact_prefill: bool) -> None:
    case = replace(ROTATED[way], window=70, exact_prefill=exact_prefill, batch=3, pad=40)
    check(Pair(case), [50, 1, 1, 4, 90, 8, *[3] * 12, 1], 15)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_several_new_tokens(tokens: int) -> None:
    check(Pair(replace(ROTATED["rotatekv"], batch=2, pad=5)), [70, *[tokens] * 5], 5)
    check(Pair(STAIRS), [70, *[tokens] * 5], 5)


@DTYPES
@pytest.mark.parametrize("pad", [0, 13])
def test_stairs_and_sinks(pad: int, dtype: torch.dtype) -> None:
    check(Pair(replace(STAIRS, batch=3, pad=pad, dtype=dtype)), [70, *[1] * 35], 35)


def test_stairs_in_a_window() -> None:
    check(Pair(replace(STAIRS, window=100, batch=2, pad=13)), [70, *[2] * 35], 35)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_bound_on_scores_and_scores_without_values(tokens: int) -> None:
    sinks = torch.linspace(-2, 8, 4)
    check(Pair(Case(batch=2, pad=5)), [100, tokens, tokens], 2, softcap=5.0, sinks=sinks)


@pytest.mark.parametrize("removed", [1, 20, 33, 99, 150])
@pytest.mark.parametrize("way", ROTATED)
def test_after_tokens_were_taken_back(way: str, removed: int) -> None:
    pair = Pair(ROTATED[way])
    check(pair, [100, 1, *[7] * 7], 8)
    for cache in pair.caches:
        cache.crop(-removed)
    pair.slots -= removed
    pair.mask = pair.mask[:, : pair.slots]
    check(pair, [1, *[8] * 5, 1], 1 if removed == 150 else 6)


@pytest.mark.parametrize("change", ROW_CHANGES)
@pytest.mark.parametrize("case", [STAIRS, ROTATED["rotatekv"]], ids=["stairs", "rotatekv"])
def test_after_rows_moved(case: Case, change: str) -> None:
    pair = Pair(replace(case, batch=3, pad=11))
    check(pair, [100, 1, 5], 2)
    index = [change_rows(cache, change) for cache in pair.caches].pop()
    pair.mask, pair.batch = pair.mask[index], len(index)
    check(pair, [1, 2, 1], 3)


@pytest.mark.parametrize("kind", ["additive", "lowest", "by head", "none", "all"])
def test_every_kind_of_mask(kind: str) -> None:
    """Some slots hidden at random, also from one query head only, or everything from one query."""
    pair = Pair(Case(batch=2))
    pair.step(100)
    outs = []
    hidden = torch.rand(2, 4, 3, 103, generator=torch.Generator().manual_seed(1)) < 0.5
    shown = torch.ones(3, 103, dtype=torch.bool).tril(100) & ~hidden
    shown[..., 0] = True
    shown = shown if kind == "by head" else shown[:, :1]
    if kind == "all":
        shown[1, :, 2] = False
    least = torch.finfo(torch.float32).min if kind == "lowest" else -torch.inf
    if kind == "none":
        shown = torch.ones(1, 1, 3, 103, dtype=torch.bool).tril(100)
    mask = shown
    if kind in ("additive", "lowest"):
        mask = torch.zeros(shown.shape).masked_fill_(~shown, least)
    keys, values = (pair.random(2, 2, 3, 64) for _ in range(2))
    query = pair.random(2, 4, 3, 64)
    for cache, routed in zip(pair.caches, (True, False), strict=True):
        cache.begin(2, 3)
        layer = cache.layers[0]
        layer.routed = routed
        held = layer.update(keys, values)
        call = Call(query, None if routed and kind == "none" else mask, 0.125)
        outs.append(layer.attention(call) if routed else portable(call, *held))
    torch.testing.assert_close(outs[0].double(), outs[1], rtol=0, atol=1e-5)
