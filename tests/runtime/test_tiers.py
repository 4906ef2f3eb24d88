"""Several coded tiers in one plane, and segments: slots stay in order whatever moves."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kvpack.core.types import Group, Site
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.policies.age_staircase import AgeStaircase
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.plane import PlaneCache
from kvpack.runtime.segments import SegmentStore
from kvpack.runtime.tokens import TokenTrack

STAIR, GROUP = 16, 8


def codec(bits: int, axis: str = "token") -> Affine:
    return Affine(bits=bits, group=Group(axis, GROUP))


def plane(ladder: tuple[int, ...] = (8, 4, 2), axis: str = "token", like: Tensor | None = None) -> PlaneCache:
    policy = AgeStaircase(stair_tokens=STAIR, rungs=tuple(str(i) for i in range(len(ladder))))
    plan = PlanePlan((), False, tuple(codec(b, axis) for b in ladder), ({},) * len(ladder))
    like = torch.zeros(1, 2, 0, 24) if like is None else like
    return PlaneCache(plan, partial(policy.placement, plane="key"), [{}] * len(ladder), Site(0), like)


class Driver:
    """Feeds a plane as a layer would."""

    def __init__(self, held: PlaneCache, batch: int = 1) -> None:
        self.held, self.track, self.batch = held, TokenTrack(), batch
        self.overlay = Overlay(held.tail)
        self.policy = AgeStaircase(stair_tokens=STAIR)

    def feed(self, x: Tensor, valid: Tensor | None = None) -> None:
        mask = None
        if valid is not None:
            past = torch.ones(self.batch, self.held.length, dtype=torch.bool)
            mask = torch.cat((past if self.track.valid is None else self.track.valid, valid), 1)
        self.track.begin(self.held.length, self.batch, x.shape[2], mask)
        self.held.append(x)
        tail = self.held.length - self.held.boundary
        self.held.encode(self.policy.leaving(tail, self.held.block, "key"), 0, self.track, self.overlay)

    def read(self) -> Tensor:
        out = self.held.tail.new_zeros((*self.held.tail.shape[:2], self.held.length, self.held.tail.shape[3]))
        self.held.read(out, 0, self.track)
        return out


def random(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 2, tokens, 24, generator=torch.Generator().manual_seed(seed))


def rung_tokens(held: PlaneCache) -> list[int]:
    return [tier.tokens for tier in held.tiers]


def test_blocks_walk_down_one_rung_per_full_stair() -> None:
    driver = Driver(plane())
    seen = []
    for start in range(0, 80, 8):
        driver.feed(random(8, seed=start))
        seen.append(rung_tokens(driver.held))
    assert seen[1::2] == [[16, 0, 0], [16, 16, 0], [16, 16, 16], [16, 16, 32], [16, 16, 48]]


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_a_prompt_at_once_and_token_by_token_end_in_the_same_bytes(axis: str) -> None:
    x = random(100)
    once, steps = Driver(plane(axis=axis)), Driver(plane(axis=axis))
    once.feed(x)
    for token in x.split(1, 2):
        steps.feed(token)
    assert rung_tokens(once.held) == rung_tokens(steps.held)
    for a, b in zip(once.held.tiers, steps.held.tiers, strict=True):
        for left, right in zip(a.store.pieces(0, 1000), b.store.pieces(0, 1000), strict=True):
            assert all(torch.equal(left.tensors[n], right.tensors[n]) for n in left.tensors)
    assert torch.equal(once.read(), steps.read())


def test_lowered_codes_equal_direct_ones_up_to_rounded_scales() -> None:
    x = random(256)
    fine, coarse = Affine(bits=8, group=Group("channel", 8), scale_dtype="float32"), None
    for bits in (4, 2, 1):
        coarse = Affine(bits=bits, group=Group("channel", 8), scale_dtype="float32")
        lowered = fine.lowering(coarse)(fine.encode(x, {}))
        direct = coarse.encode(x, {})
        a, b = (coarse.decode(p, {}, torch.float32) for p in (lowered, direct))
        share = ((a - b).abs() > 1e-4).float().mean()
        assert share < 1e-4
    assert codec(8).lowering(codec(3)) is None
    assert codec(4).lowering(Affine(bits=2, group=Group("token", 4))) is None
    assert codec(2).lowering(codec(4)) is None


def test_lowering_again_changes_nothing() -> None:
    payload = codec(2).encode(random(32), {})
    again = codec(2).lowering(codec(2))(payload)
    assert all(torch.equal(again.tensors[n], t) for n, t in payload.tensors.items())


def test_a_ladder_that_does_not_nest_loses_more_than_direct_encoding() -> None:
    x = random(256)
    walked, direct = Driver(plane((8, 3, 2))), codec(2)
    for part in x.split(STAIR, 2):
        walked.feed(part)
    old = slice(0, 256 - 2 * STAIR)
    expected = direct.decode(direct.encode(x[:, :, old].contiguous(), {}), {}, torch.float32)
    error = (walked.read()[:, :, old] - x[:, :, old]).square().mean()
    assert error > 1.05 * (expected - x[:, :, old]).square().mean()


def test_error_grows_with_age_and_one_rung_is_plain_encoding() -> None:
    x = random(96)
    driver = Driver(plane())
    driver.feed(x)
    error = (driver.read() - x).square().mean((0, 1, 3))
    two, four, eight = error[:64].mean(), error[64:80].mean(), error[80:].mean()
    assert two > 10 * four > 100 * eight
    single = Driver(plane((4,)))
    single.feed(x)
    expected = codec(4).decode(codec(4).encode(x, {}), {}, torch.float32)
    assert torch.equal(single.read(), expected)


@pytest.mark.parametrize("cropped", [1, 5, 17, 40, 77])
def test_cropping_across_rungs_keeps_the_order_of_slots(cropped: int) -> None:
    x = random(100)
    driver = Driver(plane((8, 8, 8)))
    driver.feed(x)
    driver.held.crop(100 - cropped)
    assert driver.held.length == 100 - cropped
    for start in range(0, 64, 4):
        driver.feed(random(4, seed=start + 1))
    expected = torch.cat([x[:, :, : 100 - cropped], *(random(4, seed=s + 1) for s in range(0, 64, 4))], 2)
    assert (driver.read() - expected).abs().max() < 0.05


def test_padding_shapes_no_grid_on_any_rung() -> None:
    x = random(64, batch=2)
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[0, :5] = False
    read = []
    for factor in (1.0, 1e4):
        padded = torch.where(valid[:, None, :, None], x, x * factor)
        driver = Driver(plane(like=torch.zeros(2, 2, 0, 24)), batch=2)
        driver.feed(padded, valid)
        read.append(driver.read())
    mask = valid[:, None, :, None].expand_as(read[0])
    assert torch.equal(read[0][mask], read[1][mask])


def test_a_sliding_window_drops_the_oldest_rung_first() -> None:
    driver = Driver(plane())
    driver.feed(random(96))
    driver.held.drop(70)
    assert rung_tokens(driver.held) == [16, 10, 0]
    assert driver.held.first == 70


def test_segments_are_dropped_and_cropped_as_a_whole() -> None:
    store = SegmentStore()
    for first, tokens in ((0, 4), (4, 6), (10, 2)):
        numbers = torch.arange(first, first + tokens).reshape(1, 1, -1, 1)
        store.append({"codes": numbers, "extra": numbers[:, :, :1]}, tokens)

    def live() -> list[int]:
        pieces = list(store.pieces(0, 1))
        return [int(n) for p in pieces for n in p.tensors["codes"][0, 0, p.start : p.stop, 0]]

    assert (store.tokens, live()) == (12, list(range(12)))
    per_token = 8
    store.drop(5)
    assert (store.tokens, live()) == (7, list(range(5, 12)))
    assert store.nbytes == (6 + 2 + 2) * per_token
    assert [p.start for p in store.pieces(3, 1)] == [4, 0]
    store.crop(3)
    assert live() == [5, 6, 7, 8]
    store.select(torch.tensor([0, 0]))
    assert next(iter(store.pieces(0, 1))).tensors["codes"].shape[0] == 2
    store.crop(4)
    assert (store.tokens, store.nbytes, store.encoded_tokens) == (0, 0, 12)
