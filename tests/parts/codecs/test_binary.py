"""Signs with a scale: recomputed slowly, the best scale, errors and bytes."""

import pytest
import torch

from kvpack.core.errors import RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.binary import Binary
from tests.contracts.discovery import random

GROUPS = [Group("token", 8), Group("token", 1), Group("channel", 16), Group("channel", 0)]


def decoded(codec: Binary, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    return codec.decode(codec.encode(x, {}, valid), {}, torch.float32)


def slow(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Group by group in float64, for one head [T, D]."""
    y = x.double().T if group.axis == "token" else x.double()
    rows = []
    for row in y:
        parts = row.split(group.size or len(row))
        signs = [torch.where(p >= 0, 1.0, -1.0) for p in parts]
        rows.append(torch.cat([s * p.abs().mean().half() for s, p in zip(signs, parts, strict=True)]))
    return torch.stack(rows).T if group.axis == "token" else torch.stack(rows)


@pytest.mark.parametrize("group", GROUPS, ids=repr)
@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_sign_times_the_mean_magnitude(group: Group, channels: int, dtype: torch.dtype) -> None:
    x = random(2, 2, 16, channels).to(dtype)
    y = decoded(Binary(group), x)
    for b in range(2):
        for k in range(2):
            torch.testing.assert_close(y[b, k].double(), slow(x[b, k], group).double(), rtol=1e-3, atol=0)


def test_no_other_scale_has_a_smaller_error() -> None:
    x = random(1, 1, 32, 24)
    y = decoded(Binary(), x)
    best = (y - x).square().sum()
    for factor in (0.9, 0.97, 1.03, 1.1):
        assert (factor * y - x).square().sum() > best


@pytest.mark.parametrize("number", [0.0, 2.5, -3.0])
def test_equal_numbers_and_one_token_are_exact(number: float) -> None:
    x = torch.full((1, 2, 8, 16), number)
    for group in GROUPS:
        assert torch.equal(decoded(Binary(group), x), x)
    assert torch.equal(decoded(Binary(Group("channel", 4)), x[:, :, :1]), x[:, :, :1])


def test_padding_does_not_shape_the_scale() -> None:
    x = random(2, 2, 16, 8)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, :3] = False
    y = decoded(Binary(Group("token", 8)), torch.where(valid[:, None, :, None], x, torch.nan), valid)
    expected = x[1, :, 3:8].abs().mean(1).half().float()
    assert torch.equal(y[1, :, 5].abs(), expected)
    assert torch.equal(y[0], decoded(Binary(Group("token", 8)), x)[0])


def test_bits_are_the_formula() -> None:
    """1 + 16/32: a sign, and a scale for 32 tokens."""
    assert Binary().encode(random(1, 2, 64, 64), {}).bits_per_element == 1.5
    assert Binary(Group("token", 128)).encode(random(1, 2, 128, 64), {}).bits_per_element == 1.125


def test_wrong_groups_are_refused() -> None:
    with pytest.raises(RecipeError, match="no end"):
        Binary(Group("token", 0))
    with pytest.raises(RecipeError, match="30 tokens"):
        Binary().spec((1, 2, 30, 64))
