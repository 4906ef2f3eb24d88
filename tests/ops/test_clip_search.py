"""Searched ranges against trying every pair in float64."""

import pytest
import torch

from kvpack.core.types import Group
from kvpack.ops import clip_search
from kvpack.parts.codecs.affine import Affine
from tests.contracts.discovery import random

GRIDS = [
    Affine(bits=2, group=Group("channel", 16), zero="integer", scale_dtype="float32"),
    Affine(bits=3, group=Group("channel", 16), zero="float", scale_dtype="float32"),
    Affine(bits=4, group=Group("channel", 16), zero="none", scale_dtype="float32"),
]


def groups() -> torch.Tensor:
    """Rows of one group: ordinary, one-sided, with an outlier, constant, zero."""
    x = random(40, 16, seed=1)
    x[:5] = x[:5].abs() + 0.5
    x[5:15, 3] *= 6
    x[38], x[39] = 0.75, 0
    return x


def metric(kind: str) -> torch.Tensor:
    inputs = random(50, 16, seed=2) * torch.linspace(0.2, 3, 16)
    gram = inputs.T @ inputs
    return gram if kind == "matrix" else gram.diagonal()


def loss(codec: Affine, x: torch.Tensor, grid: dict, metric: torch.Tensor) -> torch.Tensor:
    lost = (x - codec.value(codec.snap(x, grid), grid)).double()
    weights = metric.double() if metric.dim() == 2 else metric.double().diag()
    return torch.einsum("ri,ij,rj->r", lost, weights, lost)


@pytest.mark.parametrize("codec", GRIDS, ids=repr)
@pytest.mark.parametrize("kind", ["matrix", "diagonal"])
def test_best_of_all_pairs(codec: Affine, kind: str) -> None:
    x, weights = groups(), metric(kind)
    tried = clip_search.pairs(6, 0.5, independent=True)
    assert len(tried) == 36
    found = loss(codec, x, clip_search.search(x, weights, codec, tried), weights)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    centre = low.clamp(min=0) + high.clamp(max=0)
    each = []
    for gamma, beta in tried:
        ends = torch.cat((centre + beta * (low - centre), centre + gamma * (high - centre)), 1)
        each.append(loss(codec, x, codec.grid(ends), weights))
    best = torch.stack(each).amin(0)
    assert torch.allclose(found, best, rtol=1e-4, atol=1e-9)
    assert (best[:38] < 0.99 * each[0][:38]).float().mean() > 0.3, "cutting helps somewhere"


def test_pieces_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, tried = groups(), metric("matrix"), clip_search.pairs(4, 0.7, independent=True)
    whole = clip_search.search(x, weights, GRIDS[0], tried)
    monkeypatch.setattr(clip_search, "PIECE_ELEMENTS", 50)
    pieces = clip_search.search(x, weights, GRIDS[0], tried)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_one_step_is_the_codecs_own_grid() -> None:
    x = random(7, 72)
    for codec in GRIDS:
        found = clip_search.fit(x, torch.ones(72), codec, clip_search.pairs(1, 0.5, independent=True))
        assert all(torch.equal(found[name], tensor) for name, tensor in codec.grid(x).items())


def test_groups_of_one_channel_are_not_searched() -> None:
    x, codec = random(7, 5), Affine(bits=4, group=Group("channel", 1))
    found = clip_search.fit(x, torch.ones(5), codec, clip_search.pairs(4, 0.5, independent=True))
    assert all(torch.equal(found[name], tensor) for name, tensor in codec.grid(x).items())


def test_ragged_groups_read_their_own_block() -> None:
    x, gram = random(9, 40, seed=3), random(60, 40, seed=4).T @ random(60, 40, seed=4)
    tried = clip_search.pairs(5, 0.6, independent=False)
    whole = clip_search.fit(x, gram, GRIDS[1], tried)
    for i, columns in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
        alone = clip_search.search(x[:, columns], gram[columns, columns], GRIDS[1], tried)
        assert all(torch.equal(whole[name][:, i : i + 1], alone[name]) for name in whole)
