"""Block floating point against the card's formulas, in float64 and one number at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.block_float import BlockFloat

WIDTHS = (8, 48, 64, 80, 128)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(x: Tensor, mantissa: int, block: int) -> tuple[Tensor, Tensor]:
    """Values and, for each, its step; E = floor(log2 max|x|), step = 2^(E - (m - 2))."""
    flat = x.double().reshape(-1, x.shape[-1])
    values, steps = torch.zeros_like(flat), torch.zeros_like(flat)
    top = 2 ** (mantissa - 1) - 1
    for row, numbers in enumerate(flat.tolist()):
        for first in range(0, len(numbers), block or len(numbers)):
            part = numbers[first : first + (block or len(numbers))]
            peak = max(abs(v) for v in part)
            exponent = math.frexp(peak)[1] - 1
            if peak == 0 or exponent < -126:
                continue
            step = 2.0 ** (exponent - (mantissa - 2))
            for at, number in enumerate(part, first):
                values[row, at] = max(-top, min(top, round(number / step))) * step  # half to even
                steps[row, at] = step
    return values.reshape(x.shape), steps.reshape(x.shape)


def decoded(codec: BlockFloat, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x, {}), {}, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("mantissa", "block"), [(4, 32), (8, 64), (2, 16), (5, 0), (4, 128)])
def test_it_is_the_cards_formula(mantissa: int, block: int, width: int, dtype: torch.dtype) -> None:
    x = (normal(2, 2, 3, width) * 2.0 ** normal(width, seed=1).mul(4).round()).to(dtype)
    x[0, 0, 1] = 0.0
    x[0, 1, 2] = 1.75  # all equal
    expected, _ = reference(x.float(), mantissa, block)
    assert torch.equal(decoded(BlockFloat(mantissa, block), x).double(), expected)
    one = x[:, :, :1]
    assert torch.equal(decoded(BlockFloat(mantissa, block), one).double(), expected[:, :, :1])


@pytest.mark.parametrize("mantissa", range(2, 9))
def test_errors_are_within_half_a_step_except_where_the_top_is_clipped(mantissa: int) -> None:
    x = normal(4, 2, 50, 96)
    values, steps = reference(x, mantissa, 32)
    error = (decoded(BlockFloat(mantissa), x).double() - x.double()).abs()
    top = (2 ** (mantissa - 1) - 1) * steps
    clipped = x.double().abs() > top
    assert (error <= steps / 2)[~clipped].all()
    assert (error <= steps).all()
    assert torch.equal(values, decoded(BlockFloat(mantissa), x).double())


def test_small_integers_times_a_power_of_two_are_exact() -> None:
    whole = torch.randint(-7, 8, (2, 2, 9, 64), generator=torch.Generator().manual_seed(0)).float()
    whole[..., ::16] = 7  # the exponent is that of the greatest
    for power in (-130, -126, -20, 0, 90, 124):
        x = whole * 2.0**power
        expected = x if power >= -126 - 2 else torch.zeros_like(x)
        assert torch.equal(decoded(BlockFloat(4, 16), x), expected), power


@pytest.mark.parametrize("power", [-30, -1, 1, 7, 40])
def test_scaling_by_a_power_of_two_scales_the_result(power: int) -> None:
    x = normal(1, 2, 5, 80)
    codec = BlockFloat(4, 32)
    assert torch.equal(decoded(codec, x * 2.0**power), decoded(codec, x) * 2.0**power)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("mantissa", "block"), [(4, 128), (4, 64), (4, 32), (4, 16), (8, 64), (8, 32)])
def test_bits_are_mantissa_plus_eight_over_block(mantissa: int, block: int, width: int) -> None:
    payload = BlockFloat(mantissa, block).encode(normal(1, 2, 5, width), {})
    blocks = math.ceil(width / block)
    assert payload.nbytes == 10 * (math.ceil(width * mantissa / 8) + blocks)
    if width % block == 0:
        assert payload.bits_per_element == mantissa + 8 / block


def test_codes_are_nibbles_low_first_and_exponents_are_biased_like_float32() -> None:
    x = torch.tensor([[4.0, -1.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0]])
    payload = BlockFloat(4, 4).encode(x, {})
    assert payload.tensors["codes"].tolist() == [[12 | 7 << 4, 8 | 15 << 4, 0x88, 0x88]]
    assert payload.tensors["exponent"].tolist() == [[127 + 2, 0]]


def test_more_mantissa_and_smaller_blocks_help() -> None:
    x = normal(1, 2, 200, 128)
    x[..., ::21] *= 12

    def error(mantissa: int, block: int) -> float:
        return float((decoded(BlockFloat(mantissa, block), x) - x).square().mean())

    assert error(4, 32) > error(6, 32) > error(8, 32)
    assert error(4, 128) > error(4, 64) > error(4, 32) > error(4, 16)


def test_sorting_brings_outliers_together_and_helps_the_scores() -> None:
    """The card's synthetic check: six channels times twelve, queries inversely scaled."""
    factor = torch.ones(128)
    factor[torch.tensor([3, 20, 47, 66, 90, 121])] = 12.0
    keys = normal(1, 1, 1024, 128) * factor
    query = normal(1, 1, 64, 128, seed=1) / factor
    exact = query @ keys.mT
    order = keys.square().mean((0, 1, 2)).argsort()

    def loss(codec: BlockFloat | Affine, order: Tensor) -> float:
        back = torch.empty_like(keys)
        back[..., order] = codec.decode(codec.encode(keys[..., order], {}), {}, torch.float32)
        return float((query @ back.mT - exact).square().mean())

    plain = torch.arange(128)
    gains = []
    for block in (64, 32, 16):
        codec = BlockFloat(4, block)
        gains.append(loss(codec, plain) / loss(codec, order))
    assert 1.0 < gains[0] < gains[1] < gains[2]
    assert loss(BlockFloat(4, 128), plain) == pytest.approx(loss(BlockFloat(4, 128), order), rel=1e-4)
    per_token = Affine(bits=4, group=Group("channel", 0))  # 4.25 bits as well
    assert loss(BlockFloat(4, 32), order) < loss(per_token, plain)


def test_one_block_per_head_does_not_see_the_order() -> None:
    x = normal(1, 2, 20, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    codec = BlockFloat(4, 64)
    assert torch.equal(decoded(codec, x[..., order]), decoded(codec, x)[..., order])


def test_settings_that_hold_nothing_are_refused() -> None:
    for settings in ({"mantissa": 1}, {"mantissa": 9}, {"block": -1}):
        with pytest.raises(RecipeError):
            BlockFloat(**settings)
