"""A codec in the Fourier basis: when it helps, and what it stores."""

import pytest
import torch

from kvpack.core.errors import RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.binary import Binary
from kvpack.parts.codecs.in_basis import InBasis
from kvpack.parts.codecs.split_channels import SplitChannels
from tests.contracts.discovery import random

SIGNS = Binary(Group("token", 16))


def error(codec: InBasis | Binary, x: torch.Tensor) -> float:
    y = codec.decode(codec.encode(x, {}), {}, torch.float32)
    return ((y - x).norm() / x.norm()).item()


@pytest.mark.parametrize("channels", [1, 7, 8, 48, 64, 80, 127, 128])
@pytest.mark.parametrize("tokens", [1, 16])
def test_nothing_is_lost_but_by_the_codec(channels: int, tokens: int) -> None:
    x = random(1, 2, tokens, channels)
    assert error(InBasis(Affine(bits=8, group=Group("channel", 1), scale_dtype="float32")), x) < 1e-5


@pytest.mark.parametrize("channels", [31, 64])
def test_as_many_numbers_as_channels(channels: int) -> None:
    assert InBasis(SIGNS).spec((1, 2, 32, channels)) == {
        f"codec.{n}": s for n, s in SIGNS.spec((1, 2, 32, channels)).items()
    }


def test_smooth_channels_gain_and_noise_does_not() -> None:
    """Waves across channels have few Fourier coefficients; a sign is all there is to know of one whose
    magnitude is steady. White noise looks the same in every orthonormal basis, and so do waves whose
    coefficients vary as noise does: smoothness alone is not enough."""
    ramp = torch.arange(64) / 64
    waves = torch.stack([(2 * torch.pi * f * ramp).cos() for f in (1, 2, 3)])
    grain = 0.05 * random(1, 2, 64, 64, seed=1)
    steady = random(1, 2, 64, 3).sign() @ waves + grain
    varying = random(1, 2, 64, 3) @ waves + grain
    noise = random(1, 2, 64, 64)
    assert error(InBasis(SIGNS), steady) < 0.3 * error(SIGNS, steady)
    assert error(InBasis(SIGNS), varying) == pytest.approx(error(SIGNS, varying), rel=0.05)
    assert error(InBasis(SIGNS), noise) == pytest.approx(error(SIGNS, noise), rel=0.02)


def test_different_magnitudes_per_channel_lose() -> None:
    """Where it does not help: scales per channel know unequal channels, the transform mixes them."""
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    x = random(1, 2, 64, 64) * torch.logspace(-2, 0, 64)[shuffled]
    assert error(InBasis(SIGNS), x) > error(SIGNS, x)


def test_a_codec_that_learns_is_refused() -> None:
    with pytest.raises(RecipeError, match="another basis"):
        InBasis(SplitChannels(SIGNS, SIGNS))
