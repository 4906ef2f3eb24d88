"""The compiled sweep chooses what the reference chooses."""

from __future__ import annotations

import pytest
import torch

from kvpack import kernels, ops
from kvpack.core.types import Group
from kvpack.kernels import choice
from kvpack.parts.codecs.affine import Affine

pytestmark = pytest.mark.skipif(not choice.found("cpu").used, reason="no compiled kernels here")


def case(rows: int, channels: int, codec: Affine, act_order: bool = False):
    generator = torch.Generator().manual_seed(rows + channels)
    weight = torch.randn(rows, channels, generator=generator)
    x = torch.randn(2 * channels, channels, generator=generator) * torch.linspace(0.5, 3, channels)
    gram = x.T @ x
    order = gram.diagonal().argsort(descending=True) if act_order else None
    upper = ops.gptq.inverse_factor(gram if order is None else gram[order][:, order], 0.01)
    return gram, order, (weight, upper, codec.group_size(channels), codec.grid, codec.snap, codec.value)


@pytest.mark.parametrize("zero", ["float", "integer", "none"])
@pytest.mark.parametrize(
    ("rows", "channels", "size", "act_order"),
    [(1, 48, 16, False), (33, 172, 32, False), (32, 80, 24, True), (70, 64, 0, False), (5, 300, 128, True)],
)
def test_sweep_equals_the_reference(zero: str, rows: int, channels: int, size: int, act_order: bool) -> None:
    codec = Affine(bits=3, group=Group("channel", size), zero=zero)
    gram, order, given = case(rows, channels, codec, act_order)
    codes, grid = ops.gptq.solve(*given, order=order)
    found, other = kernels.gptq.solve(*given, order=order, even=codec.even)
    assert found.dtype == torch.uint8
    assert {n: (t.shape, t.dtype) for n, t in grid.items()} == {
        n: (t.shape, t.dtype) for n, t in other.items()
    }
    assert (codes == found).float().mean() > 0.99, "sums in another order may turn a tie"
    losses = [
        float(ops.layer_outputs.energies(given[0] - codec.value(c, g), gram).sum())
        for c, g in ((codes, grid), (found, other))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_numbers_that_are_none_get_the_codes_of_the_reference() -> None:
    codec = Affine(bits=4, group=Group("channel", 16))
    _, _, given = case(40, 48, codec)
    weight = given[0].clone()
    weight[3, 5], weight[7, 20], weight[9, 0] = float("nan"), float("inf"), -float("inf")
    codes, _ = ops.gptq.solve(weight, *given[1:])
    found, _ = kernels.gptq.solve(weight, *given[1:], even=codec.even)
    sound = [row for row in range(40) if row not in (3, 7, 9)]
    assert torch.equal(codes[sound], found[sound])
    assert int(found.max()) <= 15


def test_nothing_that_is_given_is_written_to() -> None:
    codec = Affine(bits=4, group=Group("channel", 16))
    _, _, given = case(1, 48, codec)
    before = [given[0].clone(), given[1].clone()]
    kernels.gptq.solve(*given, even=codec.even)
    ops.gptq.solve(*given)
    assert torch.equal(given[0], before[0])
    assert torch.equal(given[1], before[1])


def test_grids_that_are_not_even_take_the_reference() -> None:
    codec = Affine(bits=4, group=Group("channel", 16))
    _, _, given = case(8, 48, codec)
    codes, _ = ops.gptq.solve(*given)
    found, _ = kernels.gptq.solve(*given, even=lambda grid: None)
    assert torch.equal(codes, found)
