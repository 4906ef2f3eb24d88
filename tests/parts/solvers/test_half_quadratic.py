"""Half-quadratic quantisation against the card's loop, group by group in float64."""

import pytest
import torch
from torch import Tensor

from kvpack.core import pieces
from kvpack.core.errors import RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.solvers.half_quadratic import HalfQuadratic
from tests.contracts.discovery import random

EXACT = Affine(bits=3, group=Group("channel", 32), scale_dtype="float32")


def weights(rows: int, channels: int, factor: float = 1.0) -> Tensor:
    """Heavy tails, as weights have them."""
    return factor * random(rows, channels, seed=3) * random(rows, channels, seed=4).abs()


def decoded(weight: Tensor, codec: Affine, solver: HalfQuadratic) -> Tensor:
    return codec.decode(solver.solve(weight, codec, {}).payload, {}, torch.float32)


def direct(group: Tensor, bits: int, p: float, beta: float, growth: float, rounds: int) -> Tensor:
    """The card's loop on one group, with codes W*k + z; the best zero of a falling error."""
    w, levels = group.double(), 2**bits - 1
    k = levels / (w.max() - w.min())
    zero = best = -w.min() * k
    least = None
    for _ in range(rounds + 1):
        codes = (w * k + zero).round().clamp(0, levels)
        restored = (codes - zero) / k
        error = (w - restored).abs().mean()
        if least is not None and error >= least:
            break
        least, best = error, zero
        residual = w - restored
        sparse = residual.sign() * (residual.abs() - residual.abs() ** (p - 1) / beta).clamp(min=0)
        zero = (codes - (w - sparse) * k).mean()
        beta *= growth
    codes = (w * k + best).round().clamp(0, levels)
    return (codes - best) / k


@pytest.mark.parametrize("factor", [1.0, 0.02])
@pytest.mark.parametrize("channels", [48, 64, 80, 172])
def test_matches_the_direct_loop(channels: int, factor: float) -> None:
    weight = weights(6, channels, factor)
    found = decoded(weight, EXACT, HalfQuadratic())
    for row, ours in zip(weight, found, strict=True):
        for group, got in zip(row.split(32), ours.split(32), strict=True):
            expected = direct(group, 3, 0.7, 10.0, 1.01, 20)
            # The mean |error| does not change while as many numbers lie above as below: where the last
            # digit decides about another round, zeros may differ, but not what they are judged by.
            error, least = ((x.double() - group).abs().mean() for x in (got, expected))
            torch.testing.assert_close(error, least, rtol=1e-4, atol=0)


def test_in_units_of_steps_the_scale_of_a_weight_does_not_matter() -> None:
    weight, solver = weights(6, 64), HalfQuadratic(relative=True)
    torch.testing.assert_close(
        decoded(weight * 2**-7, EXACT, solver) * 2**7, decoded(weight, EXACT, solver), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_errs_more_than_rounding(bits: int, relative: bool) -> None:
    codec = Affine(bits=bits, group=Group("channel", 64))
    for weight in (weights(20, 172), weights(3, 80, 0.01), weights(1, 48).bfloat16()):
        better = (decoded(weight, codec, HalfQuadratic(relative=relative)) - weight).abs()
        rounded = (codec.decode(codec.encode(weight, {}), {}, torch.float32) - weight).abs()
        for ours, theirs in zip(better.split(64, 1), rounded.split(64, 1), strict=True):
            assert (ours.mean(1) <= theirs.mean(1) + 1e-7).all()
        assert bits == 8 or better.mean() < rounded.mean()


def test_only_zeros_change() -> None:
    weight, codec = weights(8, 80), Affine(bits=4, group=Group("channel", 32))
    solved, rounded = HalfQuadratic().solve(weight, codec, {}).tensors, codec.encode(weight, {}).tensors
    assert torch.equal(solved["scale"], rounded["scale"])
    assert not torch.equal(solved["zero"], rounded["zero"])


def test_pieces_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codec = weights(20, 80), Affine(bits=3, group=Group("channel", 32))
    whole = HalfQuadratic().solve(weight, codec, {}).tensors
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 240)
    cut = HalfQuadratic().solve(weight, codec, {}).tensors
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_constant_and_zero_rows_are_exact() -> None:
    weight = weights(4, 80)
    weight[1], weight[2] = 0.25, 0.0
    found = decoded(weight, Affine(bits=2, group=Group("channel", 32)), HalfQuadratic())
    assert torch.equal(found[1:3], weight[1:3])


@pytest.mark.parametrize(
    "codec",
    [Affine(zero="integer"), Affine(zero="none"), Affine(group=Group("token", 4)), Identity()],
    ids=repr,
)
def test_codecs_without_a_zero_to_move_are_refused(codec) -> None:
    with pytest.raises(RecipeError, match="nothing to choose"):
        HalfQuadratic().solve(random(8, 64), codec, {})
