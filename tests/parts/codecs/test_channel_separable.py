"""Channel-separable rounding of whole tokens (ZipCache 2405.14256, section 4.1), written out."""

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.channel_separable import ChannelSeparable
from kvpack.parts.codecs.codebook import Codebook
from tests.contracts.discovery import random


def codec(bits: int = 4, *, merge: bool = True, scale: str = "float32") -> ChannelSeparable:
    return ChannelSeparable(Affine(bits=bits, group=Group("channel", 0), scale_dtype=scale), merge)


def written_out(x: Tensor, bits: int, *, merge: bool) -> Tensor:
    """float64, loops over rows and tokens."""
    out = torch.empty_like(x, dtype=torch.float64)
    for row in range(len(x)):
        c = x[row].abs().amax(1, keepdim=True).double().sqrt().half().double()
        c[c == 0] = 1.0
        divided = x[row].double() / c
        for token in range(x.shape[2]):
            vectors = divided[:, token].reshape(1, -1) if merge else divided[:, token]
            low, high = vectors.amin(1, keepdim=True), vectors.amax(1, keepdim=True)
            step = torch.where(high > low, (high - low) / (2**bits - 1), torch.ones_like(high))
            snapped = torch.round((vectors - low) / step) * step + low
            out[row, :, token] = snapped.reshape(x.shape[1], -1) * c[:, 0]
    return out


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_the_formula(merge: bool, channels: int, tokens: int, bits: int) -> None:
    x = random(2, 3, tokens, channels, seed=tokens)
    part = codec(bits, merge=merge)
    found = part.decode(part.encode(x, {}), {}, torch.float32)
    torch.testing.assert_close(found.double(), written_out(x, bits, merge=merge), rtol=1e-4, atol=1e-4)


def test_equal_numbers_and_empty_channels_are_exact() -> None:
    x = torch.full((1, 2, 4, 8), 0.25)
    x[:, :, :, 3] = 0.0
    part = codec(8)
    assert torch.allclose(part.decode(part.encode(x, {}), {}, torch.float32), x, atol=2e-3)


def test_bfloat16_and_padding() -> None:
    x = random(2, 2, 12, 16).bfloat16()
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :5] = False
    wild = x.clone()
    wild[1, :, :5] = 1e4
    part = codec()
    found = [part.decode(part.encode(v, {}, valid), {}, torch.bfloat16)[1, :, 5:] for v in (x, wild)]
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(*found)


def test_scaled_channels_cost_less_than_by_token_and_metadata_less_than_by_group() -> None:
    """Card, check 3."""
    x = random(1, 2, 64, 64)
    x[..., 5] *= 30
    plain = Affine(bits=4, group=Group("channel", 128))
    separable = codec(scale="float16")
    errors, sizes = [], []
    for part in (separable, plain, Affine(bits=4, group=Group("channel", 32))):
        payload = part.encode(x, {})
        errors.append(float((part.decode(payload, {}, torch.float32) - x)[..., :5].square().mean()))
        sizes.append(payload.nbytes)
    assert errors[0] < 0.5 * errors[1]
    assert sizes[0] < sizes[2]
    codes = 64 * 2 * 64 // 2
    assert sizes[0] - codes == 2 * 2 * 64 + 4 * 64, "one scale per channel, a scale and a minimum per token"


def test_segments_and_blocks() -> None:
    assert (codec().segment, codec().token_block) == (4096, 4)


def test_a_codec_that_learns_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot encode separated channels"):
        ChannelSeparable(Codebook())
