"""The CPU's kernels for affine codes give what their reference gives, and the same decoded bits."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvpack.kernels import affine, choice
from kvpack.kernels.cpu import affine as cpu
from kvpack.kernels.cpu import integer_products
from kvpack.ops import packed_affine
from kvpack.ops.packed_affine import AffineCodes
from tests.kernels.coded_affine import coded

pytestmark = pytest.mark.skipif(not choice.found("cpu").used, reason="the CPU's kernels are not used here")

GRIDS = [
    ("token", 32, "float", "float16"),
    ("channel", 32, "float", "float16"),
    ("channel", 128, "integer", "float8_e4m3fn"),
    ("channel", 0, "none", "float32"),
    ("token", 0, "integer", "bfloat16"),
    ("channel", 20, "float", "float8_e4m3fn"),
    ("token", 8, "none", "float16"),
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected number."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def agree(x: AffineCodes, queries: int) -> None:
    """Scores, sums and decoded numbers, against float64 and the reference."""
    generator = torch.Generator().manual_seed(queries)
    exact = packed_affine.dense(x, torch.float32).double()
    query = torch.randn((*x.codes.shape[:-2], queries, x.channels), generator=generator)
    weights = torch.rand((*x.codes.shape[:-2], queries, x.tokens), generator=generator)
    assert distance(affine.scores(query, x), query.double() @ exact.mT) < 2e-6
    assert distance(affine.mix(weights, x), weights.double() @ exact) < 2e-6
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(affine.dense(x, dtype), packed_affine.dense(x, dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_width_on_every_kind_of_grid(bits: int, grid: tuple[str, int, str, str]) -> None:
    agree(coded((2, 3, 64, 80), bits, *grid), 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [8, 16, 40, 48, 64, 72, 96, 100, 128, 172])
@pytest.mark.parametrize(("axis", "size"), [("channel", 32), ("token", 8)])
def test_every_head_width(channels: int, axis: str, size: int) -> None:
    agree(coded((1, 2, 40, channels), 4, axis, size), 4)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 513, 1030])
def test_every_number_of_tokens_on_any_number_of_threads(tokens: int, threads: int) -> None:
    del threads
    agree(coded((1, 2, tokens, 16), 4, "channel", 16), 1)
    agree(coded((1, 1, tokens, 16), 2, "channel", 16), 8)


def test_one_bit() -> None:
    agree(coded((2, 2, 16, 24), 1, "channel", 16), 3)


def test_parts_of_a_longer_buffer_are_read_where_they_lie() -> None:
    x = coded((2, 3, 128, 64), 4, "token", 32)
    codes = torch.zeros((2, 3, 200, 32), dtype=torch.uint8)
    codes[:, :, 64:192] = x.codes
    part = x._replace(codes=codes[:, :, 96:160], scale=x.scale[:, :, 1:3], zero=x.zero[:, :, 1:3])  # type: ignore[index]
    agree(part, 4)


def test_rows_that_are_not_in_one_piece_are_left_to_the_reference() -> None:
    x = coded((2, 32, 64), 4, "channel", 32)
    assert cpu.fits(x)
    apart = x._replace(codes=x.codes.mT.contiguous().mT)
    assert not cpu.fits(apart)
    deep = coded((1, 2, 2, 8, 16), 4, "channel", 16)
    assert not cpu.fits(deep)
    agree(deep, 2)


def test_nothing_is_nothing() -> None:
    x = coded((1, 2, 8, 16), 4, "channel", 16)
    none = x._replace(codes=x.codes[:, :, :0], scale=x.scale[:, :, :0], zero=x.zero[:, :, :0])  # type: ignore[index]
    assert affine.scores(torch.randn(1, 2, 3, 16), none).shape == (1, 2, 3, 0)
    assert torch.equal(affine.mix(torch.randn(1, 2, 3, 0), none), torch.zeros(1, 2, 3, 16))


WEIGHTS = [(8, 0), (4, 128), (4, 96), (3, 128), (5, 48), (6, 64), (2, 128), (4, 32), (7, 160)]


@pytest.mark.parametrize(("bits", "size"), WEIGHTS)
@pytest.mark.parametrize("zero", ["float", "integer", "none"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_weights_are_multiplied_in_integers(bits: int, size: int, zero: str, rows: int) -> None:
    x = coded((100, 1920 if size in (96, 48, 160) else 1024), bits, "channel", size, zero)  # type: ignore[arg-type]
    query = torch.randn((rows, x.channels), generator=torch.Generator().manual_seed(rows))
    assert integer_products.fits(x)
    exact = query.double() @ packed_affine.dense(x, torch.float32).double().T
    # Two integers for a number that came as float32; one, of 16 bits, for a narrower one.
    assert distance(affine.scores(query, x), exact) < 2e-6
    half = query.bfloat16()
    exact = half.double() @ packed_affine.dense(x, torch.float32).double().T
    assert distance(affine.scores(half, x), exact) < 2e-4


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_numbers_of_any_size_are_multiplied(scale: float) -> None:
    x = coded((64, 512), 4, "channel", 128)
    query = torch.randn((2, 512), generator=torch.Generator().manual_seed(0)) * scale
    exact = query.double() @ packed_affine.dense(x, torch.float32).double().T
    assert float((affine.scores(query, x).double() - exact).abs().max()) <= 2e-6 * float(exact.abs().max())


def test_a_ragged_last_group_is_decoded() -> None:
    x = coded((64, 300), 4, "channel", 128)
    assert not integer_products.fits(x)
    agree(x, 2)


def test_what_is_not_a_number_shows() -> None:
    x = coded((64, 512), 4, "channel", 128)
    query = torch.full((1, 512), torch.nan)
    assert affine.scores(query, x).isnan().all()


def attended(
    query: Tensor, keys: AffineCodes, values: AffineCodes, start: int, tokens: int, mask: Tensor | None
) -> Tensor:
    """Attention over decoded keys and values in float64."""
    part = slice(start, start + tokens)
    exact, summed = (packed_affine.dense(x, torch.float32).double()[..., part, :] for x in (keys, values))
    scores = query.double() @ exact.mT
    if mask is not None:
        scores = scores + mask.double()[:, None, None]
    return scores.softmax(-1) @ summed


def whole(found: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
    """Unnormalised attention, normalised; its maxima and sums agree with each other."""
    assert found is not None
    values, maxima, total = found
    assert bool(torch.isfinite(maxima).all())
    assert bool((total > 0.99).all())
    return values / total.unsqueeze(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("keys", "values"), [(0, 1), (2, 2), (3, 5), (4, 6)])
def test_attention_over_codes(bits: int, keys: int, values: int) -> None:
    shape, generator = (2, 3, 64, 80), torch.Generator().manual_seed(bits)
    k, v = (coded(shape, bits, *GRIDS[grid]) for grid in (keys, values))  # type: ignore[arg-type]
    query = torch.randn((2, 3, 5, 80), generator=generator)
    found = whole(affine.attention(query, k, v, 0, 64, None, None))
    assert distance(found, attended(query, k, v, 0, 64, None)) < 3e-6


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (3, 31), (32, 33), (7, 505), (0, 1030)])
def test_attention_over_a_part_on_any_number_of_threads(start: int, tokens: int, threads: int) -> None:
    del threads
    generator = torch.Generator().manual_seed(tokens)
    k, v = coded((1, 1, 1040, 16), 4, "token", 8), coded((1, 1, 1040, 16), 4, "channel", 16)
    query = 4 * torch.randn((1, 1, 4, 16), generator=generator)
    found = whole(affine.attention(query, k, v, start, tokens, None, None))
    assert distance(found, attended(query, k, v, start, tokens, None)) < 3e-6


def test_attention_with_a_mask_that_may_hide_everything() -> None:
    k, v = coded((2, 2, 96, 64), 4, "token", 32), coded((2, 2, 96, 64), 4, "channel", 32)
    query = torch.randn((2, 2, 4, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 96)
    mask[0, :50] = -torch.inf
    found = whole(affine.attention(query, k, v, 0, 96, mask, None))
    assert distance(found, attended(query, k, v, 0, 96, mask)) < 3e-6
    mask[1] = -torch.inf
    hidden = affine.attention(query, k, v, 0, 96, mask, None)
    assert hidden is not None
    values, maxima, total = hidden
    assert bool((maxima[1] == -torch.inf).all())
    assert not bool(total[1].any())
    assert not bool(values[1].any())
    torch.testing.assert_close((values / total.unsqueeze(-1))[0], found[0])


def test_scores_with_a_bound_are_left_to_the_reference() -> None:
    x = coded((1, 2, 64, 64), 4, "channel", 32)
    assert affine.attention(torch.zeros(1, 2, 4, 64), x, x, 0, 64, None, 30.0) is None
