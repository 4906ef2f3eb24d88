"""What the affine codec promises beyond the contract: its errors and its bytes."""

from dataclasses import replace

import pytest
import torch

from kvpack.core.errors import RecipeError
from kvpack.core.types import Group
from kvpack.ops import affine
from kvpack.parts.codecs.affine import Affine
from tests.contracts.discovery import random

GROUPS = [Group("channel", 32), Group("channel", 24), Group("channel", 0), Group("token", 16)]
DTYPES = ["float16", "bfloat16", "float32", "float8_e4m3fn"]


def decoded(codec: Affine, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x, {}), {}, torch.float32)


def steps(codec: Affine, x: torch.Tensor) -> torch.Tensor:
    """The stored step of every number of `x`."""
    group = codec.group
    grouped = affine.split(x, group.axis, group.size)
    scale = codec.encode(x, {}).tensors["scale"].float().unsqueeze(affine.group_axis(group.axis))
    return affine.join(scale.expand_as(grouped), group.axis, x.shape[-1])


@pytest.mark.parametrize("group", GROUPS, ids=repr)
@pytest.mark.parametrize("zero", ["float", "integer", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 20.0, -20.0])
def test_errors_stay_within_half_a_step(group: Group, zero: str, dtype: str, offset: float) -> None:
    x = random(2, 2, 32, 40) * torch.linspace(0.1, 4, 40) + offset
    for bits in (2, 3, 4, 8):
        codec = Affine(bits=bits, group=group, zero=zero, scale_dtype=dtype)
        error = (decoded(codec, x) - x).abs()
        assert (error <= steps(codec, x) * 0.5 + 1e-5).all()


@pytest.mark.parametrize("group", GROUPS, ids=repr)
@pytest.mark.parametrize("zero", ["float", "integer", "none"])
def test_more_bits_smaller_error(group: Group, zero: str) -> None:
    x = random(2, 2, 32, 40)
    errors = [
        (decoded(Affine(bits=b, group=group, zero=zero), x) - x).square().mean().item() for b in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 500


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("zero", ["float", "integer", "none"])
def test_smaller_groups_smaller_error(axis: str, zero: str) -> None:
    x = random(2, 2, 128, 128)
    codecs = [Affine(bits=3, group=Group(axis, size), zero=zero) for size in (128, 64, 32, 16, 8)]
    errors = [(decoded(c, x) - x).square().mean().item() for c in codecs]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("zero", ["float", "integer"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("number", [0.0, 1.0, -0.37109375, 96.0, -1000.0])
def test_constant_groups_are_exact(zero: str, bits: int, number: float) -> None:
    x = torch.full((1, 2, 16, 32), number)
    for group in (Group("channel", 16), Group("token", 16)):
        assert torch.equal(decoded(Affine(bits=bits, group=group, zero=zero), x), x)


@pytest.mark.parametrize(
    ("codec", "channels", "expected"),
    [
        (Affine(bits=2, group=Group("token", 32)), 64, 3.0),
        (Affine(bits=2, group=Group("channel", 32)), 64, 3.0),
        (Affine(bits=4, group=Group("token", 64)), 64, 4.5),
        (Affine(bits=4, group=Group("token", 128)), 64, 4.25),
        (
            Affine(bits=2, group=Group("channel", 128), zero="integer", scale_dtype="float8_e4m3fn"),
            256,
            2.125,
        ),
        (Affine(bits=2, group=Group("channel", 128)), 256, 2.25),
        (Affine(bits=3, group=Group("channel", 128), zero="none"), 128, 3.125),
        (Affine(bits=4, group=Group("channel", 128), zero="integer"), 256, 4.1875),
    ],
    ids=repr,
)
def test_bits_per_element_are_the_formula(codec: Affine, channels: int, expected: float) -> None:
    payload = codec.encode(random(1, 2, 128, channels), {})
    assert payload.bits_per_element == expected
    assert 8 * sum(s.nbytes for s in codec.spec((1, 2, 128, channels)).values()) == expected * 256 * channels


def test_keys_want_channel_scales_and_values_want_token_scales() -> None:
    """KIVI's observation: outlier channels in keys, outlier tokens in values."""
    per_channel, per_token = (Affine(bits=2, group=Group(axis, 32)) for axis in ("token", "channel"))
    keys = random(1, 2, 64, 64)
    keys[..., [5, 40]] *= 20
    values = random(1, 2, 64, 64)
    values[:, :, 17] *= 20

    def error(codec: Affine, x: torch.Tensor) -> float:
        return (decoded(codec, x) - x).square().mean().item()

    assert error(per_channel, keys) < 0.8 * error(per_token, keys)
    assert error(per_token, values) < 0.8 * error(per_channel, values)


def test_mask_keeps_the_statistics_themselves() -> None:
    codec = Affine(bits=2, group=Group("token", 8))
    x = random(2, 3, 16, 8)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, :3] = False
    loud = x.clone()
    loud[0, :, :3] *= 100
    a, b = codec.encode(x, {}, valid), codec.encode(loud, {}, valid)
    for name in ("scale", "zero"):
        assert torch.equal(a.tensors[name], b.tensors[name])
        assert not torch.equal(a.tensors[name], codec.encode(loud, {}).tensors[name])
    assert torch.equal(a.tensors["codes"][1], b.tensors["codes"][1])


def test_three_bits_use_all_seven_steps() -> None:
    x = torch.linspace(-3, 4, 8).reshape(1, 1, 1, 8)
    codec = Affine(bits=3, group=Group("channel", 8), zero="integer", scale_dtype="float32")
    assert codec.snap(x, codec.grid(x)).flatten().unique().numel() == 8


def test_clip_shrinks_the_range() -> None:
    x = random(1, 1, 4, 128)
    full = Affine(bits=2, zero="integer")
    ratio = steps(replace(full, clip=0.8), x) / steps(full, x)
    assert torch.allclose(ratio, torch.tensor(0.8), atol=2e-3)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 0}, {"bits": 9}, {"bits": 1, "zero": "none"}],
)
def test_contradictory_settings_are_refused(settings: dict) -> None:
    with pytest.raises(RecipeError) as caught:
        Affine(**settings)
    assert caught.value.hint


def test_rows_that_do_not_fill_groups_are_refused() -> None:
    with pytest.raises(RecipeError, match="30 tokens"):
        Affine(group=Group("token", 8)).spec((1, 2, 30, 64))


@pytest.mark.parametrize("zero", ["float", "integer", "none"])
@pytest.mark.parametrize("tokens", [4, 20, 96])
def test_a_segment_has_one_grid_per_channel(zero: str, tokens: int) -> None:
    """A token group of size 0 equals one that is as long as the segment."""
    x = random(2, 2, tokens, 24)
    whole = Affine(bits=4, group=Group("token", 0), zero=zero).encode(x, {})
    sized = Affine(bits=4, group=Group("token", tokens), zero=zero).encode(x, {})
    for name, tensor in sized.tensors.items():
        assert torch.equal(whole.tensors[name], tensor)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[0, 0] = False
    loud = x.clone()
    loud[0, :, 0] *= 100
    codec = Affine(bits=4, group=Group("token", 0), zero=zero)
    assert torch.equal(
        codec.encode(loud, {}, valid).tensors["scale"], codec.encode(x, {}, valid).tensors["scale"]
    )


def test_segments_are_bounded_and_empty_ones_have_no_grid() -> None:
    codec = Affine(bits=4, group=Group("token", 0))
    assert (codec.token_block, codec.segment) == (4, 4096)
    assert Affine(group=Group("token", 8)).segment == Affine(group=Group("channel", 0)).segment == 0
    assert codec.spec((1, 2, 960, 64))["scale"].shape == (1, 2, 1, 64)
    assert codec.spec((1, 2, 0, 64))["scale"].shape == (1, 2, 0, 64)
    assert codec.encode(random(1, 2, 1000, 64), {}).bits_per_element == pytest.approx(4 + 32 / 1000)
