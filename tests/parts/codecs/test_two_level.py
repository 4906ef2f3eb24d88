"""Codes on codes: the protective range, exhaustively, and a float64 reading of what is stored."""

import pytest
import torch
from torch import Tensor

from kvpack import ops
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.two_level import TwoLevel
from kvpack.parts.solvers.gptq import Gptq
from tests.contracts.discovery import random

WIDTHS = [48, 64, 80, 172, 300]


def weights(rows: int, channels: int) -> Tensor:
    return random(rows, channels, seed=3) * random(rows, 1, seed=4).exp()


def error(codec, weight: Tensor) -> Tensor:
    return (codec.decode(codec.encode(weight, {}), {}, torch.float32) - weight).abs()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("upwards", [False, True])
def test_every_range_fits_a_signed_byte(bits: int, upwards: bool) -> None:
    """All groups by their ends, and both integers next to the exact step."""
    limit, levels = ops.two_level.protective_range(bits), 2**bits - 1
    ends = torch.arange(-limit, limit + 1)
    low, high = (e.flatten() for e in torch.meshgrid(ends, ends, indexing="ij"))
    low, high = low[low <= high].double(), high[low <= high].double()
    exact = (high - low) / levels
    step = (exact.ceil() if upwards else exact.round()).clamp(min=1)
    assert step.max() <= 255
    top = ((high - low) / step).round().clamp(max=levels) * step + low
    assert top.max() <= 127
    assert low.min() >= -128


def test_the_protective_range_of_four_bits_is_needed() -> None:
    assert ops.two_level.protective_range(4) == 119
    low, high = -127.0, 127.0
    step = -(-(high - low) // 15)
    assert round((high - low) / step) * step + low > 127, "the whole range of a byte overflows"
    assert -(-238 // 15) / 2 + 119 <= 127 < -(-240 // 15) / 2 + 120 + 1


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_what_is_stored_is_integers_within_a_byte(bits: int) -> None:
    codec = TwoLevel(bits=bits, size=32)
    for weight in (weights(40, 300), random(40, 172).sign() * 3, random(40, 80) ** 5):
        tensors = codec.encode(weight, {}).tensors
        channels = weight.shape[1]
        codes = ops.bits.unpack(tensors["codes"], bits, channels).long()
        step, low = (tensors[n].long().repeat_interleave(32, 1)[:, :channels] for n in ("step", "low"))
        whole = codes * step + low
        assert whole.min() >= -128
        assert whole.max() <= 127
        expected = whole.double() * tensors["scale"].double()
        torch.testing.assert_close(
            codec.decode(codec.encode(weight, {}), {}, torch.float64), expected, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_codes_that_a_sweep_has_moved_fit_as_well(bits: int) -> None:
    """GPTQ may push weights far beyond the range that their grid was fitted to."""
    rows = TwoLevel(bits=bits, size=16).gridded(weights(20, 64))
    grid = rows.grid(weights(20, 64))
    for factor in (1.0, 3.0, 1000.0):
        value = rows.value(rows.snap(factor * weights(20, 64), grid), grid) / rows.scale.float()
        assert value.round().max() <= 127
        assert value.round().min() >= -128


@pytest.mark.parametrize("channels", WIDTHS)
def test_bits_are_the_formula(channels: int) -> None:
    specs = TwoLevel().spec((7, channels))
    groups = -(-channels // 128)
    assert sum(s.nbytes for s in specs.values()) == 7 * (channels // 2 + 2 * groups + 2)


@pytest.mark.parametrize("channels", WIDTHS)
def test_integer_grids_cost_half_a_byte_step_at_most(channels: int) -> None:
    """Card (g) 3: half a step of one level of 4 bits, and half a byte's, bound the error of a group."""
    weight = weights(60, channels)
    one = Affine(bits=4, group=Group("channel", 128), scale_dtype="float32")
    step = one.encode(weight, {}).tensors["scale"]
    row = TwoLevel().encode(weight, {}).tensors["scale"].float()
    found = error(TwoLevel(), weight)
    for i, group in enumerate(found.split(128, 1)):
        assert (group.square().mean(1).sqrt() <= (step[:, i] + row[:, 0]) / 2).all()
    assert found.mean() <= error(one, weight).mean() + row.mean() / 2
    if channels > 128:
        assert error(TwoLevel(size=64), weight).mean() < error(TwoLevel(size=512), weight).mean()


def test_integer_products_equal_floats() -> None:
    """Card (g) 5: bytes times bytes, summed as integers over all groups, then one scale per row."""
    weight, x = weights(12, 300), random(5, 300, seed=8)
    scale = x.abs().amax(1, keepdim=True) / 127
    tokens = (x / scale).round().to(torch.int64)
    payload = TwoLevel().encode(weight, {})
    row = payload.tensors["scale"].double()
    whole = (TwoLevel().decode(payload, {}, torch.float64) / row).round().to(torch.int64)
    integer = (tokens @ whole.T).double() * scale.double() * row.T
    dense = (tokens * scale.double()) @ TwoLevel().decode(payload, {}, torch.float64).T
    torch.testing.assert_close(integer, dense, rtol=1e-6, atol=1e-6)


def test_zeros_constants_and_extremes() -> None:
    weight = weights(6, 80)
    weight[0], weight[1], weight[2, :32] = 0.0, 0.5, 0.0
    found = TwoLevel(size=32).decode(TwoLevel(size=32).encode(weight, {}), {}, torch.float32)
    assert torch.equal(found[0], weight[0])
    torch.testing.assert_close(found[1], weight[1], rtol=2e-3, atol=0)
    assert (found[2, :32] == 0).all()
    assert TwoLevel().encode(weight[:1], {}).tensors["scale"].item() == 1.0


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_improves_on_rounding(act_order: bool) -> None:
    x = random(400, 172, seed=6) @ random(172, 172, seed=7)
    weight, stats = weights(20, 172), {"gram": {"gram": x.T @ x}}
    payload = Gptq(act_order=act_order).solve(weight, TwoLevel(size=64), stats).payload
    codec = TwoLevel(size=64)

    def lost(p) -> float:
        return ((codec.decode(p, {}, torch.float32) - weight) @ x.T).square().sum().item()

    assert lost(payload) < 0.7 * lost(codec.encode(weight, {}))
    assert torch.equal(payload.tensors["scale"], codec.encode(weight, {}).tensors["scale"])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_one_affine_grid_stands_for_both_levels_exactly(bits: int, scale: float) -> None:
    codec, weight = TwoLevel(bits=bits, size=24), scale * weights(40, 172)
    tensors = codec.encode(weight, {}).tensors
    codes = ops.bits.unpack(tensors["codes"], bits, 172).float()
    grid = {name: tensors[name] for name in ("step", "low")}
    integers = ops.two_level.value(codes, grid, 24)
    whole = {
        n: t.repeat_interleave(24, -1)[:, :172]
        for n, t in ops.two_level.as_affine(grid, tensors["scale"]).items()
    }
    assert torch.equal(codes * whole["scale"] + whole["zero"], integers * tensors["scale"].float())
