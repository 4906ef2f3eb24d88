"""Directed rounding, and the grids against a slow float64 reference."""

import pytest
import torch

from kvpack.ops import affine

NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def finite_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a dtype, ascending, as float64."""
    bits = 8 * dtype.itemsize
    words = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(getattr(torch, f"int{bits}"))
    numbers = words.view(dtype).double()
    return numbers[numbers.isfinite()].unique()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("up", [True, False])
def test_rounding_takes_the_neighbour_on_its_side(dtype: torch.dtype, up: bool) -> None:
    numbers = finite_numbers(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.randn(4000, generator=generator)
            * 10.0 ** torch.randint(-9, 3, (4000,), generator=generator),
            torch.tensor([0.0, -0.0, 1e-12, -1e-12, 448.0, -448.0, 6.1e-5, 2.0**-9]),
            numbers[::997].float(),
        ]
    ).clamp(float(numbers[0]), float(numbers[-1]))
    got = affine.round_towards(x, dtype, up=up).double()
    index = torch.searchsorted(numbers, x.double(), right=not up)
    expected = numbers[index] if up else numbers[index - 1]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_saturates(dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for up in (True, False):
        got = affine.round_towards(torch.tensor([torch.inf, -torch.inf, 3.4e38]), dtype, up=up)
        assert got.double().tolist() == [limit, -limit, limit]


def reference(x: list[float], bits: int, zero: str, clip: float, grid: tuple[float, float]) -> list[float]:
    """Numbers after quantisation, by the formulas of the papers, one at a time."""
    step, offset = grid
    levels = 2**bits - 1
    if zero == "float":
        return [min(max(round((v - offset) / step), 0), levels) * step + offset for v in x]
    return [(min(max(round(v / step) + offset, 0), levels) - offset) * step for v in x]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("zero", ["float", "integer"])
def test_matches_the_papers_formulas(bits: int, clip: float, zero: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = (torch.randn(50, 32, generator=generator) * 3).half().float()
    low, high = affine.value_range(x, -1)
    grid = affine.fit(low, high, bits, zero, torch.float32, clip)
    scale, stored = grid["scale"][:, None], grid["zero"][:, None]
    decoded = affine.values(affine.codes(x, scale, stored, bits), scale, stored, bits)
    for row, y in zip(x.double().tolist(), decoded.tolist(), strict=True):
        m, M = min(row) * clip, max(row) * clip
        step = (M - m) / (2**bits - 1)
        offset = m if zero == "float" else round(-m / step)
        expected = reference(row, bits, zero, clip, (step, offset))
        near = [abs(a - b) < 1e-4 for a, b in zip(y, expected, strict=True)]
        # float32 and float64 may disagree about a number halfway between two codes.
        assert sum(near) >= 31
        assert max(abs(a - b) for a, b in zip(y, expected, strict=True)) < step * 1.001


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-3, -2.5), (0, 7), (100, 101), (-101, -100), (5, 5)])
def test_integer_zero_fits_a_byte_and_covers_the_range(bits: int, low: float, high: float) -> None:
    grid = affine.fit(torch.tensor(low), torch.tensor(high), bits, "integer", torch.float16, 1.0)
    assert grid["zero"].dtype == torch.int8
    x = torch.linspace(low, high, 101)
    y = affine.values(affine.codes(x, grid["scale"], grid["zero"], bits), grid["scale"], grid["zero"], bits)
    assert (x - y).abs().max() <= grid["scale"].float() * 0.5001


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("zero", ["float", "integer"])
def test_clipping_leaves_a_range_off_zero_in_place(bits: int, zero: str) -> None:
    for low, high in ((100.0, 101.0), (-8.0, -6.0), (5.0, 5.0)):
        grid = affine.fit(torch.tensor(low), torch.tensor(high), bits, zero, torch.float16, 0.5)
        x = torch.linspace(low, high, 11)
        y = affine.values(
            affine.codes(x, grid["scale"], grid["zero"], bits), grid["scale"], grid["zero"], bits
        )
        assert (x - y).abs().max() <= (high - low) / 2 + grid["scale"].float() / 2
        if low == high:
            assert torch.equal(x, y)


@pytest.mark.parametrize("zero", ["float", "integer", "none"])
@pytest.mark.parametrize("std", [0.01, 1.0, 20.0])
def test_a_byte_for_the_scale_costs_little_when_clipping(zero: str, std: float) -> None:
    x = torch.randn(400, 128, generator=torch.Generator().manual_seed(0)) * std
    errors = []
    for dtype in (torch.float32, torch.float8_e4m3fn):
        grid = affine.fit(*affine.value_range(x, -1), 2, zero, dtype, 0.8)
        scale, offset = (grid[n][:, None] if n in grid else None for n in ("scale", "zero"))
        y = affine.values(affine.codes(x, scale, offset, 2), scale, offset, 2)
        errors.append((x - y).square().mean().item())
    assert errors[1] < 1.03 * errors[0]


@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("zero", ["float", "integer", "none"])
def test_a_step_below_the_stored_range_becomes_its_smallest_number(clip: float, zero: str) -> None:
    grid = affine.fit(torch.tensor(-1e-4), torch.tensor(1e-4), 3, zero, torch.float8_e4m3fn, clip)
    assert float(grid["scale"]) == 2.0**-9


def test_ragged_groups_keep_their_own_range() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 50.0, 60.0]])
    low, high = affine.value_range(affine.split(x, "channel", 4), -1)
    assert low.tolist() == [[0.0, 50.0]]
    assert high.tolist() == [[3.0, 60.0]]
    assert torch.equal(affine.join(affine.split(x, "channel", 4), "channel", 6), x)


def test_range_ignores_invalid_numbers() -> None:
    x = torch.tensor([[1.0, 100.0], [torch.nan, -3.0]])
    low, high = affine.value_range(x, -1, torch.tensor([[True, False], [False, False]]))
    assert (low.tolist(), high.tolist()) == ([1.0, 0.0], [1.0, 0.0])
