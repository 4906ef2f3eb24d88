"""Low-rank segments beyond the contract: ranks, padding, errors and bytes."""

import pytest
import torch

from kvpack.core.errors import RecipeError
from kvpack.parts.codecs.low_rank import LowRank
from tests.contracts.discovery import random


def decoded(codec: LowRank, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    return codec.decode(codec.encode(x, {}, valid), {}, torch.float32)


@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_full_rank_is_exact_to_float16(channels: int, tokens: int) -> None:
    x = random(1, 2, tokens, channels)
    codec = LowRank(rank=channels, short_tokens=0, chunk_tokens=1)
    assert (decoded(codec, x) - x).norm() < 1e-3 * x.norm()


def test_error_falls_with_every_rank() -> None:
    x = random(2, 2, 48, 32)
    codecs = [LowRank(rank=r, short_tokens=0, chunk_tokens=16) for r in (1, 2, 4, 8, 16, 32)]
    errors = [(decoded(c, x) - x).norm().item() for c in codecs]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


def test_short_segments_have_their_own_rank() -> None:
    codec = LowRank(rank=6, short_rank=3, short_tokens=32, chunk_tokens=16)
    for tokens, rank in ((16, 3), (32, 3), (48, 6), (480, 6)):
        assert codec.spec((1, 2, tokens, 40))["left"].shape == (1, 2, tokens, rank)
        assert codec.encode(random(1, 2, tokens, 40), {}).tensors["right"].shape == (1, 2, 40, rank)
    assert codec.rank_of(48, 4) == 4


@pytest.mark.parametrize(("tokens", "rank", "bits"), [(960, 4, 0.5667), (64, 2, 0.75), (32768, 4, 0.502)])
def test_bits_are_the_formula(tokens: int, rank: int, bits: float) -> None:
    """16 r (T + D) / (T D): the card's numbers for a prompt and for a chunk of 64."""
    codec = LowRank(rank=4, segment_tokens=32768)
    stored = 8 * sum(s.nbytes for s in codec.spec((1, 1, tokens, 128)).values()) / (tokens * 128)
    assert stored == 16 * rank * (tokens + 128) / (tokens * 128)
    assert stored == pytest.approx(bits, rel=1e-3)


def test_padding_is_zero_and_does_not_turn_the_factors() -> None:
    x = random(2, 2, 32, 16)
    valid = torch.ones(2, 32, dtype=torch.bool)
    valid[0, :7] = False
    codec = LowRank(rank=4, short_tokens=0, chunk_tokens=8)
    y = decoded(codec, x, valid)
    assert y[0, :, :7].abs().max() < 1e-6
    alone = LowRank(rank=4, short_tokens=0, chunk_tokens=1)
    torch.testing.assert_close(y[:1, :, 7:], decoded(alone, x[:1, :, 7:]), rtol=0, atol=2e-3)


def test_rows_of_a_batch_equal_single_runs() -> None:
    codec = LowRank(rank=4, short_tokens=0, chunk_tokens=8)
    x = random(2, 2, 48, 24)
    both = decoded(codec, x)
    for row in range(2):
        torch.testing.assert_close(both[row : row + 1], decoded(codec, x[row : row + 1]), rtol=0, atol=1e-3)


def test_factored_read_equals_dense_read() -> None:
    """q (Q P^T)^T = (q P) Q^T: what a fused read would compute."""
    x, q = random(1, 2, 48, 32), random(1, 2, 1, 32, seed=1)
    codec = LowRank(rank=4, short_tokens=0, chunk_tokens=16)
    payload = codec.encode(x, {})
    left, right = (payload.tensors[n].float() for n in ("left", "right"))
    dense = q @ codec.decode(payload, {}, torch.float32).mT
    torch.testing.assert_close((q @ right) @ left.mT, dense, rtol=0, atol=1e-3)


def test_equal_numbers_and_bfloat16() -> None:
    codec = LowRank(rank=1, short_tokens=0, chunk_tokens=4)
    x = torch.full((1, 1, 16, 8), 3.0)
    assert (decoded(codec, x) - x).abs().max() < 5e-3
    y = codec.decode(codec.encode(x.bfloat16(), {}), {}, torch.bfloat16)
    assert y.dtype == torch.bfloat16


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(RecipeError, match="whole chunks of 20"):
        LowRank(rank=4, chunk_tokens=20)
    with pytest.raises(RecipeError, match="30 tokens"):
        LowRank(rank=4, chunk_tokens=16).spec((1, 2, 30, 64))
