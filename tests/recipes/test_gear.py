"""GEAR's bits are the paper's formula, and an honest comparison at equal bits is possible."""

from __future__ import annotations

import math

import pytest
import torch

from kvpack.core.roles import Codec
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.recipe.load import load
from tests.contracts.discovery import random
from tests.recipes.conftest import Make


def codecs(reference: str) -> tuple[Codec, Codec]:
    cache = load(reference).recipe.kv_cache
    assert cache is not None
    return cache.tiers["old"].key, cache.tiers["old"].value


def share(vector: int) -> float:
    """Outliers of a vector: 1 % at either end, whole entries."""
    return 2 * math.ceil(0.01 * vector) / vector


def formula(bits: int, grid: float, rank: int, tokens: int, channels: int, taken: float, place: int) -> float:
    """The card's: b + qmeta + 16 r (T + D)/(T D) + s (16 + index)."""
    return bits + grid + 16 * rank * (tokens + channels) / (tokens * channels) + taken * (16 + place)


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize(("tokens", "rank"), [(960, 4), (1920, 4), (64, 2)])
@pytest.mark.parametrize(
    ("variant", "bits", "grouped"), [("", 2, True), ("@4bit", 4, True), ("@kcvt-4bit", 4, False)]
)
def test_stored_bits(channels: int, tokens: int, rank: int, variant: str, bits: int, grouped: bool) -> None:
    key, value = codecs(f"gear{variant}")
    x = random(1, 2, tokens, channels)
    grids = (32 / 64, 32 / 64) if grouped else (32 / tokens, 32 / channels)
    place = 8 if tokens <= 256 else 16
    expected = formula(bits, grids[0], rank, tokens, channels, share(tokens), place)
    assert key.encode(x, {}).bits_per_element == pytest.approx(expected, rel=1e-6)
    expected = formula(bits, grids[1], rank, tokens, channels, share(channels), 8)
    assert value.encode(x, {}).bits_per_element == pytest.approx(expected, rel=1e-6)


def test_keys_of_a_prompt_are_the_published_bits() -> None:
    """2-bit KIVI backbone, groups of 64, rank 4, 2 % outliers with 16-bit places, T = 1000: 3.7."""
    key, _ = codecs("gear")
    found = key.encode(random(1, 2, 1920, 128), {}).bits_per_element
    assert found == pytest.approx(formula(2, 0.5, 4, 1920, 128, 0.02, 16), rel=0.01)
    without, _ = codecs("gear@gear-l")
    assert without.encode(random(1, 2, 960, 128), {}).bits_per_element == pytest.approx(3.067, rel=0.01)


def test_a_chunk_leaves_the_window_as_one_segment() -> None:
    for codec in codecs("gear"):
        assert (codec.token_block, codec.segment) == (64, 4096)
    cache = load("gear").recipe.kv_cache
    assert cache is not None
    assert [cache.policy.leaving(t, 64, "value") for t in (63, 64, 1000)] == [0, 64, 960]


def test_at_equal_bits_it_beats_smaller_groups_but_not_a_third_bit() -> None:
    """The honest test: GEAR's bits could also buy smaller groups, or wider codes."""
    x = random(1, 2, 960, 128)
    x = x + 2 * random(1, 2, 960, 3, seed=1) @ random(1, 2, 3, 128, seed=2)
    x = torch.where(random(1, 2, 960, 128, seed=3) > 2.5, 6 * x, x)

    def measured(codec: Codec) -> tuple[float, float]:
        payload = codec.encode(x, {})
        return payload.bits_per_element, (codec.decode(payload, {}, torch.float32) - x).norm().item()

    for codec, group in zip(codecs("gear"), (Group("token", 16), Group("channel", 16)), strict=True):
        bits, error = measured(codec)
        smaller = measured(Affine(bits=2, group=group))
        wider = measured(Affine(bits=3, group=Group(group.axis, 64)))
        assert bits < smaller[0]
        assert error < smaller[1]
        assert wider[0] < bits
        assert wider[1] < error


def test_a_prompt_is_one_segment_and_every_chunk_another(make: Make) -> None:
    made = make("gear")
    model, layer = made.load(), made.plan.kv[0]
    tokens = torch.randint(3, 256, (1, 330), generator=torch.Generator().manual_seed(0))
    shape = (1, layer.attention.kv_heads, 0, layer.attention.head_dim)

    def stored(*segments: int) -> int:
        codec_bytes = (
            s.nbytes
            for plane in ("key", "value")
            for length in segments
            for s in codecs("gear")[plane == "value"].spec((*shape[:2], length, shape[3]), "float32").values()
        )
        return len(made.plan.kv) * sum(codec_bytes)

    with torch.inference_mode():
        cache = model(tokens[:, :200], use_cache=True).past_key_values
        sizes = [cache.nbytes]
        for start in range(200, 330, 26):
            cache = model(
                tokens[:, start : start + 26], past_key_values=cache, use_cache=True
            ).past_key_values
            sizes.append(cache.nbytes)
    token = 2 * 2 * shape[1] * shape[3] * 4 + 4  # both planes of two layers, float32, and a position
    held = [(8, (192,)), (34, (192,)), (60, (192,)), (22, (192, 64)), (48, (192, 64)), (10, (192, 64, 64))]
    for size, (tail, segments) in zip(sizes, held, strict=True):
        assert size == stored(*segments) + tail * token + 4 * sum(segments)
