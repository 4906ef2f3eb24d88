"""Pruning and rounding in one sweep, against the same written column by column in float64."""

import warnings

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.codecs.mirrored_levels import MirroredLevels
from kvpack.parts.codecs.nm_sparse import NmSparse
from kvpack.parts.solvers.joint_sweep import JointSweep
from tests.contracts.discovery import random

INNER = [
    Affine(bits=3, group=Group("channel", 8), scale_dtype="float32"),
    Affine(bits=2, group=Group("channel", 0), zero="integer", scale_dtype="float32"),
    MirroredLevels(16),
]


def gram_of(channels: int, tokens: int = 300) -> dict:
    x = random(tokens, channels, seed=3).double() @ random(channels, channels, seed=4).double()
    return {"gram": {"gram": x.T @ x}}


def chosen(w: Tensor, start: int, stop: int, cost: Tensor) -> Tensor:
    """Which weights of the columns `start` to `stop` stay, from the best two of every four."""
    kept = torch.zeros_like(w[:, start:stop], dtype=torch.bool)
    for first in range(start, stop, 4):
        score = w[:, first : first + 4].square() * cost[first : first + 4]
        kept[:, first - start : first - start + 4].scatter_(1, score.topk(2).indices, True)
    return kept


def direct(weight: Tensor, inner, gram: Tensor, damp: float = 0.01) -> Tensor:
    """Optimal brain surgery: drop or round one column after the other, inverting what remains each time."""
    w = weight.double().clone()
    rows, channels = w.shape
    h = gram + damp * gram.diagonal().mean() * torch.eye(channels, dtype=torch.float64)
    cost = 1 / torch.linalg.cholesky(torch.linalg.inv(h), upper=True).diagonal().square()
    size = 2 * inner.group_size(channels // 2)
    out = torch.zeros_like(w)
    for i in range(channels):
        if i % size == 0:
            stop = min(i + size, channels)
            survivors = w[:, i:stop][chosen(w, i, stop, cost)].reshape(rows, -1)
            grid = inner.grid(survivors.float())
        if i % 4 == 0:
            kept = chosen(w, i, i + 4, cost)
        column = w[:, i : i + 1].float()
        value = inner.value(inner.snap(column, grid), grid)[:, 0].double()
        out[:, i] = torch.where(kept[:, i % 4], value, 0.0)
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i:] -= torch.outer((w[:, i] - out[:, i]) / inverse[0, 0], inverse[0])
    return out


def lost(weight: Tensor, codec, payload, gram: Tensor) -> float:
    error = codec.decode(payload, {}, torch.float32).double() - weight.double()
    return ((error @ gram) * error).sum().item()


@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize("block", [128, 16, 6])
def test_matches_the_direct_solution(inner, block: int) -> None:
    weight, stats, codec = random(10, 48, seed=5), gram_of(48), NmSparse(inner)
    payload = JointSweep(block=block).solve(weight, codec, stats).payload
    got = codec.decode(payload, {}, torch.float32).double()
    expected = direct(weight, inner, stats["gram"]["gram"])
    assert torch.isclose(got, expected, rtol=1e-3, atol=1e-3).float().mean() > 0.95


@pytest.mark.parametrize("channels", [48, 80, 172, 35])
@pytest.mark.parametrize("solver", [JointSweep(), JointSweep("energy", joint=False)], ids=repr)
def test_at_most_two_of_four_remain(channels: int, solver: JointSweep) -> None:
    codec = NmSparse(Affine(bits=2, group=Group("channel", 64)))
    for weight in (random(20, channels), random(1, channels).bfloat16()):
        payload = solver.solve(weight, codec, gram_of(channels)).payload
        found = codec.decode(payload, {}, torch.float32)
        padded = torch.nn.functional.pad(found, (0, -channels % 4))
        assert (torch.unflatten(padded != 0, -1, (-1, 4)).sum(-1) <= 2).all()
        assert payload.shape == weight.shape


@pytest.mark.parametrize("inner", INNER[1:], ids=repr)
def test_one_sweep_beats_two_and_two_beat_magnitudes(inner) -> None:
    """In two bits; where rounding costs little beside pruning, both are alike."""
    weight, stats, codec = random(40, 96, seed=5), gram_of(96), NmSparse(inner)
    gram = stats["gram"]["gram"]
    joint, two = (
        lost(weight, codec, s.solve(weight, codec, stats).payload, gram)
        for s in (JointSweep(), JointSweep(joint=False))
    )
    assert joint < two < lost(weight, codec, codec.encode(weight, {}), gram)


def test_independent_channels_are_pruned_by_magnitude_and_rounded() -> None:
    weight, codec = random(10, 48), NmSparse(Affine(bits=3, group=Group("channel", 8)))
    solved = JointSweep().solve(weight, codec, {"gram": {"gram": torch.eye(48) * 7}}).tensors
    for name, tensor in codec.encode(weight, {}).tensors.items():
        assert torch.equal(solved[name], tensor), name


def test_without_a_grid_it_prunes() -> None:
    weight, stats, codec = random(20, 64, seed=5), gram_of(64), NmSparse(Identity())
    payload = JointSweep().solve(weight, codec, stats).payload
    assert lost(weight, codec, payload, stats["gram"]["gram"]) < 0.8 * lost(
        weight, codec, codec.encode(weight, {}), stats["gram"]["gram"]
    )


def test_searched_ranges_help_even_grids() -> None:
    weight, stats = random(40, 256, seed=5), gram_of(256, 600)
    codec = NmSparse(Affine(bits=2, group=Group("channel", 64)))
    plain, searched = (
        lost(
            weight, codec, JointSweep(clip_steps=n).solve(weight, codec, stats).payload, stats["gram"]["gram"]
        )
        for n in (1, 6)
    )
    assert searched < plain


def test_what_cannot_be_is_refused() -> None:
    weight, codec = random(4, 16), NmSparse(Affine(bits=2))
    with pytest.raises(RecipeError, match="nothing to prune"):
        JointSweep().solve(weight, Affine(), gram_of(16))
    with pytest.raises(RecipeError, match="that 2 divides"):
        JointSweep().solve(weight, NmSparse(Affine(group=Group("channel", 3))), gram_of(16))
    for stats in ({}, gram_of(12), {"gram": {"gram": torch.full((16, 16), torch.nan)}}):
        with pytest.raises(KvpackError, match="Gram matrix of 16"):
            JointSweep().solve(weight, codec, stats)


def test_a_hopeless_matrix_falls_back_with_a_warning() -> None:
    weight, codec = random(4, 16), NmSparse(Affine(bits=2))
    bad = {"gram": {"gram": -torch.eye(16) * 5}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solved = JointSweep().solve(weight, codec, bad).tensors
    assert "pruned by magnitude" in str(caught[0].message)
    assert all(torch.equal(solved[n], t) for n, t in codec.encode(weight, {}).tensors.items())
