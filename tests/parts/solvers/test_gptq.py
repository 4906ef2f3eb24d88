"""GPTQ against a direct float64 reference, and where it must equal rounding."""

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Group, Payload
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.solvers.gptq import Gptq
from tests.contracts.discovery import random

CODECS = [
    Affine(bits=4, group=Group("channel", 16), zero="integer", scale_dtype="float32"),
    Affine(bits=3, group=Group("channel", 0)),
    Affine(bits=2, group=Group("channel", 20)),
]


def gram_of(channels: int, tokens: int = 300) -> dict:
    x = random(tokens, channels, seed=3).double() @ random(channels, channels, seed=4).double()
    return {"gram": {"gram": x.T @ x, "count": torch.tensor(tokens)}}


def direct(weight: Tensor, codec: Affine, gram: Tensor, damp: float) -> Tensor:
    """Optimal brain surgery, column by column, inverting the remaining Gram matrix each time."""
    w = weight.double().clone()
    size = codec.group_size(w.shape[1])
    h = gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    quantised = torch.empty_like(w)
    for i in range(w.shape[1]):
        if i % size == 0:
            grid = codec.grid(w[:, i : i + size].float())
        column = w[:, i : i + 1].float()
        quantised[:, i] = codec.value(codec.snap(column, grid), grid)[:, 0].double()
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i:] -= torch.outer((w[:, i] - quantised[:, i]) / inverse[0, 0], inverse[0])
    return quantised


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("block", [128, 16, 7])
def test_matches_the_direct_solution(codec: Affine, block: int) -> None:
    weight, stats = random(10, 48, seed=5), gram_of(48)
    payload = Gptq(block=block).solve(weight, codec, stats).payload
    expected = direct(weight, codec, stats["gram"]["gram"], 0.01)
    got = codec.decode(payload, {}, torch.float32)
    rounding = codec.decode(codec.encode(weight, {}), {}, torch.float32)
    assert torch.isclose(got.double(), expected, atol=1e-4).float().mean() > 0.97
    assert torch.isclose(rounding.double(), expected, atol=1e-4).float().mean() < 0.8


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [128, 16, 7])
def test_independent_channels_are_rounded(codec: Affine, act_order: bool, block: int) -> None:
    weight = random(10, 48)
    stats = {"gram": {"gram": torch.eye(48) * 7}}
    solved = Gptq(act_order=act_order, block=block).solve(weight, codec, stats).tensors
    for name, tensor in codec.encode(weight, {}).tensors.items():
        assert torch.equal(solved[name], tensor), name


def test_active_channels_first_helps_when_few_are_active() -> None:
    weight, codec = random(16, 64, seed=5), Affine(bits=3, group=Group("channel", 32))
    x = random(500, 64, seed=6) @ random(64, 64, seed=7)
    x *= torch.linspace(0.05, 10, 64) ** 2
    stats = {"gram": {"gram": x.T @ x}}

    def error(payload: Payload) -> float:
        return ((codec.decode(payload, {}, torch.float32) - weight) @ x.T).square().mean().item()

    assert error(Gptq(act_order=True).solve(weight, codec, stats).payload) < error(
        Gptq().solve(weight, codec, stats).payload
    )


def test_dead_channels_are_rounded_not_zeroed() -> None:
    stats = gram_of(48)
    stats["gram"]["gram"][:, 10] = 0
    stats["gram"]["gram"][10] = 0
    weight, codec = random(10, 48), CODECS[0]
    got = codec.decode(Gptq().solve(weight, codec, stats).payload, {}, torch.float32)
    assert (got[:, 10] - weight[:, 10]).abs().max() < 0.4
    assert got[:, 10].abs().max() > 0.5


def test_hopeless_gram_falls_back_with_a_warning() -> None:
    weight, codec = random(10, 48), CODECS[0]
    stats = {"gram": {"gram": -torch.ones(48, 48) + 0.5 * torch.eye(48)}}
    with pytest.warns(RuntimeWarning, match="rounded to nearest"):
        payload = Gptq().solve(weight, codec, stats).payload
    assert torch.equal(payload.tensors["codes"], codec.encode(weight, {}).tensors["codes"])


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({}, "missing"),
        ({"gram": {"gram": torch.eye(3)}}, "shape"),
        ({"gram": {"gram": torch.full((48, 48), torch.nan)}}, "NaN"),
    ],
)
def test_bad_statistics_are_refused(stats: dict, message: str) -> None:
    with pytest.raises(KvpackError, match=message) as caught:
        Gptq().solve(random(10, 48), CODECS[0], stats)
    assert caught.value.hint


@pytest.mark.parametrize("codec", [Identity(), Affine(group=Group("token", 5))], ids=repr)
def test_codecs_without_channel_grids_are_refused(codec) -> None:
    with pytest.raises(RecipeError, match="gptq"):
        Gptq().solve(random(10, 48), codec, gram_of(48))
