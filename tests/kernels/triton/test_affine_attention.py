from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpack.core.types import Group
from kvpack.kernels.triton import available
from kvpack.ops.packed_affine import AffineCodes
from tests.kernels.triton.coded import DEVICE, GRIDS, close, coded, normal, numbers

if not available():
    pytest.skip("triton, with a GPU or its interpreter, is needed", allow_module_level=True)

from kvpack.kernels.triton.affine_attention import affine_attention
from kvpack.kernels.triton.attention_plan import fits

TOKENS, CHANNELS = Group("token", 32), Group("channel", 32)


def _expected(
    query: Tensor, keys: AffineCodes, values: AffineCodes, span: slice, mask: Tensor | None, softcap: float
) -> Tensor:
    k, v = numbers(keys)[:, :, span], numbers(values)[:, :, span]
    scores = query.double() @ k.mT * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask[:, None, None].double()
    return torch.softmax(scores, -1) @ v


def _check(
    query: Tensor,
    keys: AffineCodes,
    values: AffineCodes,
    start: int = 0,
    tokens: int | None = None,
    mask: Tensor | None = None,
    softcap: float = 0.0,
    splits: int | None = None,
) -> None:
    stop = keys.tokens if tokens is None else start + tokens
    acc, _, total = affine_attention(
        query, keys, values, start=start, tokens=tokens, mask=mask, softcap=softcap, splits=splits
    )
    expected = _expected(query, keys, values, slice(start, stop), mask, softcap)
    assert close(acc / total[..., None], expected, query.dtype)


@pytest.mark.parametrize(
    ("bits", "heads", "width"),
    [
        *((bits, heads, width) for bits in (2, 4) for heads in (1, 4, 8) for width in (64, 80, 96, 128)),
        *((bits, heads, 80) for bits in (3, 8) for heads in (1, 4, 8)),
        *((bits, 4, width) for bits in (3, 8) for width in (64, 96, 128)),
    ],
)
def test_grouped_heads_and_widths_as_kivi_stores_them(bits: int, heads: int, width: int) -> None:
    """Keys in groups of tokens, values in groups of channels, a ragged last group at 80."""
    keys = coded(normal(1, 1, 96, width), bits, TOKENS)
    values = coded(normal(1, 1, 96, width, seed=1), bits, CHANNELS)
    dtype = (torch.float16, torch.bfloat16)[heads > 1]
    _check(normal(1, 1, heads, width, seed=2, dtype=dtype), keys, values, tokens=77)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("grid", GRIDS, ids="-".join)
@pytest.mark.parametrize("group", [TOKENS, CHANNELS, Group("channel", 0)], ids=str)
def test_grids_and_groups_of_both_sides(group: Group, grid: tuple[str, str], dtype: torch.dtype) -> None:
    keys = coded(normal(1, 1, 64, 64), 4, group, *grid)
    values = coded(normal(1, 1, 64, 64, seed=1), 4, group, *grid)
    _check(normal(1, 1, 4, 64, seed=2, dtype=dtype), keys, values)


@pytest.mark.parametrize("size", [0, 8, 24, 48, 96])
def test_groups_of_tokens_that_tiles_do_and_do_not_divide(size: int) -> None:
    keys = coded(normal(1, 1, 192, 64), 2, Group("token", size))
    values = coded(normal(1, 1, 192, 64, seed=1), 2, Group("token", size))
    _check(normal(1, 1, 2, 64, seed=2, dtype=torch.float16), keys, values, start=51, tokens=90)
    _check(normal(1, 1, 2, 64, seed=2), keys, values, start=51, tokens=40)


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 31), (31, 1), (40, 33), (96, 192), (1, 287)])
@pytest.mark.parametrize("splits", [None, 1])
def test_any_range_of_the_buffers(start: int, tokens: int, splits: int | None) -> None:
    keys = coded(normal(2, 1, 288, 64), 2, TOKENS)
    values = coded(normal(2, 1, 288, 64, seed=1), 4, CHANNELS)
    _check(normal(2, 1, 4, 64, seed=2, dtype=torch.float16), keys, values, start, tokens, splits=splits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_padding_is_not_read(dtype: torch.dtype) -> None:
    keys = coded(normal(2, 1, 256, 64), 4, TOKENS)
    values = coded(normal(2, 1, 256, 64, seed=1), 4, CHANNELS)
    mask = torch.zeros(2, 200, device=DEVICE)
    mask[0, :150] = -torch.inf
    mask[1, 7] = 1.5
    _check(normal(2, 1, 4, 64, seed=2, dtype=dtype), keys, values, 32, 200, mask)


def test_scores_are_capped() -> None:
    keys = coded(3 * normal(1, 1, 64, 64), 4, CHANNELS)
    values = coded(normal(1, 1, 64, 64, seed=1), 4, CHANNELS)
    _check(3 * normal(1, 1, 4, 64, seed=2), keys, values, softcap=5.0)


def test_steps_far_apart_neither_overflow_nor_vanish() -> None:
    """Half-precision products; some channels 10^4 times others, some tokens a hundred times."""
    scale = torch.logspace(-2, 2, 64, device=DEVICE)
    keys = coded(normal(1, 1, 64, 64) * scale, 4, TOKENS)
    values = coded(normal(1, 1, 64, 64, seed=1) * scale * scale[:, None], 4, CHANNELS)
    query = (normal(1, 1, 4, 64, seed=2) / scale).bfloat16()
    _check(query, keys, values)


def test_parts_are_joined_by_their_maxima() -> None:
    keys = coded(normal(1, 1, 160, 64), 4, TOKENS)
    values = coded(normal(1, 1, 160, 64, seed=1), 4, CHANNELS)
    query = normal(1, 1, 4, 64, seed=2)
    whole = affine_attention(query, keys, values)
    parts = [affine_attention(query, keys, values, start=a, tokens=n) for a, n in ((0, 70), (70, 90))]
    maximum = torch.maximum(parts[0][1], parts[1][1])
    assert torch.equal(maximum, whole[1])
    factors = [torch.exp(part[1] - maximum) for part in parts]
    total = sum(part[2] * factor for part, factor in zip(parts, factors, strict=True))
    acc = sum(part[0] * factor[..., None] for part, factor in zip(parts, factors, strict=True))
    torch.testing.assert_close(acc / total[..., None], whole[0] / whole[2][..., None])


def test_nothing_read_weighs_nothing() -> None:
    keys, values = (coded(normal(1, 1, 64, 64, seed=s), 4, CHANNELS) for s in (0, 1))
    hidden = torch.full((1, 64), -torch.inf, device=DEVICE)
    for kwargs in ({"tokens": 0}, {"mask": hidden}, {"mask": hidden, "splits": 2}):
        acc, maximum, total = affine_attention(normal(1, 1, 2, 64), keys, values, **kwargs)
        assert not acc.any()
        assert not total.any()
        assert (maximum == -torch.inf).all()


def test_buffers_may_be_parts_of_larger_ones() -> None:
    """[B, K, capacity, ...] cut out of [K, B, more, ...], garbage in the free tokens."""
    keys = coded(normal(2, 3, 128, 64), 4, CHANNELS)
    values = coded(normal(2, 3, 128, 64, seed=1), 2, CHANNELS)
    wide = []
    for x in (keys, values):
        tensors = []
        for t in (x.codes, x.scale, x.zero):
            room = torch.full(
                (3, 2, 160, t.shape[-1]), torch.nan if t.is_floating_point() else 255, device=DEVICE
            )
            room = room.to(t.dtype)
            room[:, :, :128] = t.transpose(0, 1)
            tensors.append(room.transpose(0, 1)[:, :, :150])
        wide.append(x._replace(codes=tensors[0], scale=tensors[1], zero=tensors[2]))
    query = normal(2, 3, 4, 64, seed=2, dtype=torch.float16)
    got = affine_attention(query, *wide, tokens=128)
    for a, b in zip(got, affine_attention(query, keys, values), strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_refused() -> None:
    keys, values = (coded(normal(1, 1, 32, 64, seed=s), 4, CHANNELS) for s in (0, 1))
    assert fits(keys, values, 4)
    assert not fits(coded(normal(1, 1, 32, 64), 4, Group("channel", 1)), values, 4)
    with pytest.raises(ValueError, match="not all among 32"):
        affine_attention(normal(1, 1, 4, 64), keys, values, start=1, tokens=32)
    with pytest.raises(ValueError, match="64 channels"):
        affine_attention(normal(1, 1, 4, 80), keys, values)
    with pytest.raises(ValueError, match="mask"):
        affine_attention(normal(1, 1, 4, 64), keys, values, mask=normal(1, 31))
