from __future__ import annotations

import pytest
import torch

from kvpack.core.types import Group
from kvpack.kernels.triton import available
from tests.kernels.triton.coded import DEVICE, GRIDS, close, coded, normal, numbers

if not available():
    pytest.skip("triton, with a GPU or its interpreter, is needed", allow_module_level=True)

from kvpack.kernels.triton import int8_matmul as int8
from kvpack.kernels.triton.affine_matmul import affine_matmul

GROUPS = (Group("channel", 32), Group("channel", 0), Group("token", 24))


def _check(
    rows: int, weight_shape: tuple[int, int], dtype: torch.dtype, *how: object, splits: int | None = None
):
    weight = coded(normal(*weight_shape), *how)
    x = normal(rows, weight_shape[1], seed=1, dtype=dtype)
    got = affine_matmul(x, weight, splits=splits)
    assert got.dtype == dtype
    assert close(got, x.double() @ numbers(weight).mT, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 16, 17, 70])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_and_numbers_of_inputs(bits: int, rows: int, dtype: torch.dtype) -> None:
    _check(rows, (72, 256), dtype, bits, Group("channel", 128))


@pytest.mark.parametrize("grid", GRIDS, ids="-".join)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_grids(group: Group, grid: tuple[str, str]) -> None:
    _check(3, (48, 172), torch.float32, 4, group, *grid)


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("channels", [48, 64, 80, 172, 300])
def test_ragged_widths(channels: int, group: Group) -> None:
    _check(20 if channels < 100 else 3, (72, channels), torch.float16, 3, group)


@pytest.mark.parametrize("bits", [1, 5, 6, 7])
def test_every_other_width_of_codes(bits: int) -> None:
    _check(2, (16, 100), torch.float16, bits, Group("channel", 64))


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_channels_split_among_programs(splits: int) -> None:
    _check(1, (130, 640), torch.float16, 4, Group("channel", 128), splits=splits)


def test_inputs_and_weights_may_be_parts_of_larger_tensors() -> None:
    weight = coded(normal(64, 128), 4, Group("channel", 64))
    part = weight._replace(codes=weight.codes[8:40], scale=weight.scale[8:40], zero=weight.zero[8:40])
    x = normal(3, 256, seed=1)[:, ::2]
    assert close(affine_matmul(x, part), x.double() @ numbers(weight)[8:40].mT, torch.float32)


def test_no_inputs_and_wrong_inputs() -> None:
    weight = coded(normal(32, 64), 4, Group())
    assert affine_matmul(normal(0, 64), weight).shape == (0, 32)
    with pytest.raises(ValueError, match="64 channels"):
        affine_matmul(normal(1, 65), weight)


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize(("size", "channels"), [(0, 300), (32, 200), (64, 256), (128, 172)])
@pytest.mark.parametrize("splits", [None, 2])
def test_integers(rows: int, size: int, channels: int, splits: int | None) -> None:
    weight = coded(normal(70, channels), 8, Group("channel", size), "none")
    x = torch.randint(-128, 128, (rows, channels), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    steps = normal(rows, seed=2).abs()
    got = int8.int8_matmul(x.to(DEVICE), steps, weight, torch.float32, splits=splits)
    expected = (x.to(DEVICE).double() * steps.double()[:, None]) @ numbers(weight).mT
    assert close(got, expected, torch.float32)


def test_integers_need_symmetric_codes_in_even_groups() -> None:
    assert not int8.fits(coded(normal(8, 64), 8, Group("channel", 0), "float"))
    assert not int8.fits(coded(normal(8, 64), 4, Group("channel", 0), "none"))
    assert not int8.fits(coded(normal(8, 64), 8, Group("channel", 24), "none"))
    weight = coded(normal(8, 64), 8, Group("channel", 0), "none")
    with pytest.raises(ValueError, match="do not fit"):
        int8.int8_matmul(normal(2, 64), normal(2), weight, torch.float32)
