"""The CPU's kernels encode to the same bits as their reference."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from kvpack.core.types import Group, Solution
from kvpack.kernels import affine_encode, choice
from kvpack.kernels.cpu import affine_encode as cpu
from kvpack.ops import affine_encode as reference
from kvpack.ops.packed_affine import AffineCodes
from kvpack.packing import relative_error
from kvpack.parts.codecs.affine import Affine

pytestmark = pytest.mark.skipif(not choice.found("cpu").used, reason="the CPU's kernels are not used here")

ZEROS = ("float", "integer", "none")
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
GROUPS = [("channel", 32), ("channel", 20), ("channel", 0), ("token", 8), ("token", 0)]
SHAPES = [(2, 3, 16, 80), (8, 128), (16, 172), (8, 1), (2, 8, 48), (1, 1, 32, 33)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.3).to(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """The same numbers; NaN equals NaN, and zeros of either sign are alike."""
    shapes = found.shape == expected.shape and found.dtype == expected.dtype
    return shapes and torch.equal(found.float().nan_to_num(1e9), expected.float().nan_to_num(1e9))


def agree(
    x: Tensor, bits: int, zero: str, stored: torch.dtype, axis: str, size: int, clip: float = 1.0
) -> None:
    """Codes and grid of `encode`, codes on a given grid, ranges and lost squares."""
    assert cpu.fits(x, axis, size)
    codes, grid = reference.encode(x, bits, zero, stored, clip, axis, size)
    own, found = affine_encode.encode(x, bits, zero, stored, clip, axis, size)
    assert found.keys() == grid.keys()
    assert all(same(found[name], grid[name]) for name in grid)
    given = affine_encode.codes(x, grid["scale"], grid.get("zero"), bits, axis, size)
    assert torch.equal(own, codes)
    assert torch.equal(given, codes)
    ranges = affine_encode.value_range(x, axis, size), reference.value_range(x, axis, size)
    assert all(same(*pair) for pair in zip(*ranges, strict=True))
    if x.isfinite().all():
        held = AffineCodes(codes, grid["scale"], grid.get("zero"), bits, axis, size, x.shape[-1])
        assert affine_encode.lost(x, held) == pytest.approx(reference.lost(x, held), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_grid(bits: int, group: tuple[str, int], dtype: torch.dtype) -> None:
    x = normal((2, 3, 16, 80), dtype, bits)
    for zero, stored in product(ZEROS, STORED):
        if bits > 1 or zero != "none":
            agree(x, bits, zero, stored, *group)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_every_shape(group: tuple[str, int], shape: tuple[int, ...], threads: int) -> None:
    for bits, zero in product((2, 3, 8), ZEROS):
        agree(normal(shape, torch.float32), bits, zero, torch.float16, *group)


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-3, 1e3, 1e6, 3e38])
@pytest.mark.parametrize("zero", ZEROS)
def test_steps_beyond_what_is_stored(zero: str, size: float) -> None:
    x = normal((64, 64), torch.float32) * size
    for stored, move, bits in product(STORED, (0, 1, -3), (2, 4, 8)):
        agree(x.clamp(-3e38, 3e38) + move * size, bits, zero, stored, "channel", 16)


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -0.3, 65504.0, 1e-8, -3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_constants(number: float, group: tuple[str, int]) -> None:
    for zero, stored, bits in product(ZEROS, STORED, (3, 8)):
        agree(torch.full((8, 40), number), bits, zero, stored, *group)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("place", [0, 17, 39])
def test_numbers_that_are_none(number: float, group: tuple[str, int], place: int) -> None:
    x = normal((8, 40), torch.float32)
    x[3, place] = number
    for zero, stored in product(ZEROS, STORED):
        agree(x, 4, zero, stored, *group)


def test_halves_round_to_even() -> None:
    x = torch.arange(0, 16, 0.5).repeat(4, 1)  # integer zeros: code = x where the step is 1
    agree(torch.cat((x, x[:, :1] + 15), 1), 4, "float", torch.float16, "channel", 0)
    scale, zero = torch.ones(4, 1), torch.zeros(4, 1)
    found = affine_encode.codes(x, scale, zero, 8, "channel", 0)
    assert found[0, :8].tolist() == [0, 0, 1, 2, 2, 2, 3, 4]


@pytest.mark.parametrize("zero", ZEROS)
def test_clipped_ranges(zero: str) -> None:
    for group, dtype in product(GROUPS, (torch.float32, torch.bfloat16)):
        agree(normal((16, 80), dtype), 4, zero, torch.float16, *group, clip=0.9)


def test_rows_that_lie_apart() -> None:
    whole = normal((2, 16, 3, 128), torch.bfloat16).transpose(1, 2)
    for axis, size in GROUPS:
        agree(whole[:, 1:, :, 16:80], 4, "float", torch.float16, axis, size)


def test_many_items(threads: int) -> None:
    for axis, size in (("channel", 128), ("token", 32)):
        agree(normal((3, 256, 256), torch.bfloat16), 3, "integer", torch.float16, axis, size)


def test_what_does_not_fit_is_left_to_the_reference() -> None:
    for x in (
        normal((8, 32), torch.float64),
        normal((32, 8), torch.float32).T,
        normal((2, 2, 2, 8, 32), torch.float32),
    ):
        assert not cpu.fits(x, "channel", 0)
        found = affine_encode.encode(x, 4, "float", torch.float16, 1.0, "channel", 0)
        assert torch.equal(found[0], reference.encode(x, 4, "float", torch.float16, 1.0, "channel", 0)[0])
    with pytest.raises(RuntimeError, match="don't multiply"):
        affine_encode.value_range(normal((9, 32), torch.float32), "token", 8)


@pytest.mark.parametrize("group", [Group("channel", 32), Group("channel", 20), Group("token", 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_relative_error(group: Group, dtype: torch.dtype) -> None:
    x = normal((64, 172), dtype)
    codec = Affine(bits=3, group=group)
    payload = codec.encode(x, {})
    exact, decoded = x.double(), codec.decode(payload, {}, torch.float32).double()
    expected = float((exact - decoded).norm() / exact.norm())
    assert relative_error(x, codec, Solution(payload)) == pytest.approx(expected, rel=6e-6)  # six digits
    assert relative_error(0 * x, codec, Solution(codec.encode(0 * x, {}))) == 0.0
