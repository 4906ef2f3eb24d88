"""Compiled rows of tokens against their reference, over sources, steps and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpack import ops
from kvpack.core.rows import LevelCodes, Outliers, Place, Spread, Step, TokenRows, Turn
from kvpack.core.types import Group
from kvpack.kernels import choice, rows
from kvpack.parts.codecs.affine import Affine

pytestmark = pytest.mark.skipif(not choice.found("cpu").used, reason="no kernels for this CPU")

BATCH, HEADS, TOKENS = 2, 4, 77
SOURCES = ("affine by token", "affine by channel", "levels", "levels by token", *range(5))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def source(kind: str | int, outer: int, tokens: int, channels: int) -> object:
    x = random(BATCH, outer, tokens, channels)
    if isinstance(kind, int):
        return x.to(DTYPES[kind])
    if kind.startswith("affine"):
        axis = kind.split()[-1]
        codec = Affine(bits=3, group=Group(axis, 7 if axis == "token" else 24), zero="integer")
        return codec._packed(codec.encode(x, {}))
    by_token = kind == "levels by token"
    ranges = random(
        BATCH if by_token else 1, outer, *((tokens, 1) if by_token else (1, channels)), seed=2
    ).half()
    codes = torch.randint(0, 8, x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return LevelCodes(ops.bits.pack(codes, 3), random(8, seed=3), ranges, ranges + 1, 3, channels)


def steps(width: int, channels: int, tokens: int, partner: str) -> tuple[Step, ...]:
    """A permutation, Hadamard transforms of as many heads as make a power of two, and a turn."""
    length = channels & -channels
    turned = torch.arange(width)
    turned = turned ^ 1 if partner == "neighbours" else turned.roll(width // 2)
    own, other = (random(BATCH, tokens, width, seed=seed) for seed in (5, 6))
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(4))
    return Place(order), Spread(length), Turn(own, other, turned)


def agree(x: TokenRows) -> None:
    from kvpack.kernels.cpu import rows as compiled

    assert compiled.fits(x)
    dense = rows.dense(x)
    for queries in (1, 5):
        query, weights = (
            random(*dense.shape[:2], queries, dense.shape[3]),
            random(*dense.shape[:2], queries, dense.shape[2]),
        )
        for ours, expected in (
            (rows.scores(query, x), query @ dense.mT),
            (rows.mix(weights, x), weights @ dense),
        ):
            assert ours.dtype == torch.float32
            assert (ours - expected).abs().max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("width", [16, 80])
def test_every_source(kind: str | int, width: int) -> None:
    agree(TokenRows(source(kind, HEADS, TOKENS, width)))
    agree(TokenRows(source(kind, 1, TOKENS, HEADS * width), heads=HEADS))


@pytest.mark.parametrize("partner", ["halves", "neighbours"])
@pytest.mark.parametrize("width", [16, 48, 64])
@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_every_step(chosen: tuple[int, ...], width: int, partner: str) -> None:
    channels = HEADS * width
    found = steps(width, channels, TOKENS, partner)
    x = TokenRows(
        source("affine by channel", 1, TOKENS, channels), None, tuple(found[i] for i in chosen), HEADS
    )
    agree(x)
    shared = [replace_turn(step) for step in x.steps]
    agree(x._replace(steps=tuple(shared)))


def replace_turn(step: Step) -> Step:
    """One table of positions for all rows of the batch."""
    return Turn(step.own[:1], step.other[:1], step.partner) if isinstance(step, Turn) else step


@pytest.mark.parametrize("index", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_outliers(index: torch.dtype) -> None:
    x = source("levels by token", 1, TOKENS, 192)
    places = random(BATCH, 1, TOKENS, 192, seed=7).argsort(-1)[..., :5].to(index)
    agree(TokenRows(x, Outliers(random(BATCH, 1, TOKENS, 5).half(), places), heads=2))


def test_threads_divide_the_tokens() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        agree(TokenRows(source("levels by token", 1, 500, 64), heads=2))
    finally:
        torch.set_num_threads(before)


def test_parts_of_a_store_are_read_where_they_are() -> None:
    """Views of growing buffers: rows of a wider tensor."""
    x = source("levels by token", 2, TOKENS, 32)
    assert isinstance(x, LevelCodes)
    cut = slice(11, 50)
    views = x._replace(**{n: getattr(x, n)[:, :, cut] for n in ("codes", "centre", "scale")})
    agree(TokenRows(views))


def test_what_does_not_fit_is_left_to_the_reference() -> None:
    from kvpack.kernels.cpu import rows as compiled

    turn_first = tuple(reversed(steps(32, 64, TOKENS, "halves")))
    narrow = TokenRows(source("levels", 2, TOKENS, 8))
    for x in (narrow, TokenRows(source(0, 1, TOKENS, 64), None, turn_first, 2)):
        assert not compiled.fits(x)
        query = random(BATCH, 2, 3, 8 if x is narrow else 32)
        torch.testing.assert_close(rows.scores(query, x), query @ rows.dense(x).mT)
