"""VidKV's nominal and stored bits, and what its variants are made of."""

from __future__ import annotations

import pytest
import torch

from kvpack.core.roles import Codec
from kvpack.recipe.load import load
from tests.contracts.discovery import random, stats_of


def codecs(reference: str) -> tuple[Codec, Codec]:
    cache = load(reference).recipe.kv_cache
    assert cache is not None
    return cache.tiers["old"].key, cache.tiers["old"].value


def bits(codec: Codec, channels: int) -> float:
    x = random(1, 2, 128, channels)
    return codec.encode(x, codec.fit(stats_of(codec, x))).bits_per_element


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [
        ("", 2.25, 2.1),
        ("@k1.25", 1.875, 2.1),
        ("@k1.75", 2.625, 2.1),
        ("@v2", 2.25, 3.0),
        ("@text", 3.0, 3.0),
        ("@no-fft", 2.25, 2.1),
    ],
)
def test_stored_bits(channels: int, variant: str, key: float, value: float) -> None:
    """share * 3 + (1 - share) * 1.5 for keys; 1.6 + 16/32 for values."""
    found = [bits(codec, channels) for codec in codecs(f"vidkv{variant}")]
    assert found == pytest.approx([key, value], rel=0.002)


def test_the_window_leaves_as_a_whole() -> None:
    cache = load("vidkv").recipe.kv_cache
    assert cache is not None
    for codec in codecs("vidkv"):
        assert (codec.token_block, codec.segment) == (32, 0)
    assert [cache.policy.leaving(t, 32, "key") for t in (127, 128, 300)] == [0, 128, 256]


def test_the_fourier_basis_of_wide_and_narrow_channels() -> None:
    """Head dimensions whose narrow side is odd, and the smallest ones."""
    key, _ = codecs("vidkv")
    for channels in (2, 6, 8, 10, 80):
        x = random(1, 2, 64, channels)
        state = key.fit(stats_of(key, x))
        y = key.decode(key.encode(x, state), state, torch.float32)
        assert torch.cosine_similarity(x.flatten(), y.flatten(), 0) > 0.8
