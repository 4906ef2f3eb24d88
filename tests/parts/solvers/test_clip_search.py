"""Rounding on searched ranges: never a worse group, and AWQ's clipping computed directly."""

import pytest
import torch

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.block_float import BlockFloat
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.solvers.clip_search import ClipSearch
from tests.contracts.discovery import random

CODEC = Affine(bits=3, group=Group("channel", 32), zero="integer", scale_dtype="float32")


def inputs(channels: int) -> torch.Tensor:
    return random(200, channels, seed=3) @ random(channels, channels, seed=4)


@pytest.mark.parametrize("channels", [48, 64, 80, 172])
def test_outputs_of_every_group_by_direct_search(channels: int) -> None:
    x, weight = inputs(channels), random(5, channels, seed=5)
    found = ClipSearch(steps=10, least=0.55).solve(weight, CODEC, {"gram": {"gram": x.T @ x}}).payload
    decoded = CODEC.decode(found, {}, torch.float32)
    for start in range(0, channels, 32):
        here = slice(start, min(start + 32, channels))
        part, seen = weight[:, here], x[:, here].double()
        best = torch.full((5,), torch.inf, dtype=torch.float64)
        for step in range(10):
            strength = 1 - 0.05 * step
            grid = CODEC.grid(part.clamp(part.amin(1, True) * strength, part.amax(1, True) * strength))
            lost = (CODEC.value(CODEC.snap(part, grid), grid) - part).double()
            best = torch.minimum(best, (seen @ lost.T).square().sum(0))
        error = (seen @ (decoded[:, here] - part).double().T).square().sum(0)
        assert torch.allclose(error, best, rtol=1e-3)


@pytest.mark.parametrize(
    "solver", [ClipSearch(), ClipSearch(metric="energy", ends="alone", steps=5)], ids=repr
)
def test_no_group_loses_more_than_by_rounding(solver: ClipSearch) -> None:
    x, weight = inputs(80), random(30, 80, seed=5)
    weight[0], weight[1] = 0, 0.3
    weight = weight.bfloat16()
    gram = x.T @ x

    def losses(payload) -> torch.Tensor:
        lost = CODEC.decode(payload, {}, torch.float32) - weight
        if solver.metric == "energy":
            return torch.stack([(part**2).sum(1) for part in (lost * gram.diagonal().sqrt()).split(32, 1)])
        blocks = [(lost[:, s : s + 32], gram[s : s + 32, s : s + 32]) for s in range(0, 80, 32)]
        return torch.stack([((part @ block) * part).sum(1) for part, block in blocks])

    found = losses(solver.solve(weight, CODEC, {"gram": {"gram": gram}}).payload)
    plain = losses(CODEC.encode(weight, {}))
    assert (found <= plain * 1.001 + 1e-6).all()
    assert found.sum() < 0.97 * plain.sum()


def test_block_exponents_can_be_searched() -> None:
    x, weight, codec = inputs(64), random(6, 64), BlockFloat(mantissa=3, block=32)
    payload = ClipSearch().solve(weight, codec, {"gram": {"gram": x.T @ x}}).payload
    assert codec.decode(payload, {}, torch.float32).isfinite().all()


def test_no_steps_are_plain_rounding() -> None:
    weight = random(6, 80)
    found = ClipSearch(steps=1).solve(weight, CODEC, {"gram": {"gram": torch.eye(80)}}).tensors
    assert all(torch.equal(found[n], t) for n, t in CODEC.encode(weight, {}).tensors.items())


@pytest.mark.parametrize(
    "stats", [{}, {"gram": {"gram": torch.eye(3)}}, {"gram": {"gram": torch.full((80, 80), torch.nan)}}]
)
def test_bad_statistics_are_refused(stats: dict) -> None:
    with pytest.raises(KvpackError, match="Gram matrix"):
        ClipSearch().solve(random(6, 80), CODEC, stats)


@pytest.mark.parametrize("codec", [Identity(), Affine(group=Group("token", 5))], ids=repr)
def test_codecs_without_channel_grids_are_refused(codec) -> None:
    with pytest.raises(RecipeError, match="clip_search"):
        ClipSearch().solve(random(10, 80), codec, {"gram": {"gram": torch.eye(80)}})
