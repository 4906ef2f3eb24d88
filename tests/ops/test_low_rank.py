"""Power iteration finds nearly the best factors."""

import pytest
import torch

from kvpack.ops import low_rank
from tests.contracts.discovery import random


def error(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    return (x - left @ right.mT).norm().item()


def decaying(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall like 1/i, as the residuals of a quantiser do."""
    x = random(tokens, channels, seed=seed).double()
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u * (1 / torch.arange(1, len(s) + 1))) @ v


def card(x: torch.Tensor, rank: int, iterations: int, seed: int) -> torch.Tensor:
    """The card's iteration in float64: made orthonormal in the last round only."""
    right = torch.randn(x.shape[-1], rank, generator=torch.Generator().manual_seed(seed)).double()
    left = x.new_empty(0)
    for i in range(iterations):
        last = i == iterations - 1
        left = x @ (torch.linalg.qr(right).Q if last else right)
        left = torch.linalg.qr(left).Q if last else left
        right = x.T @ left
    return left @ right.T


@pytest.mark.parametrize("shape", [(64, 8), (20, 48), (64, 64), (33, 80), (100, 128)], ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_it_is_the_published_iteration(shape: tuple[int, int], iterations: int) -> None:
    x = decaying(*shape)
    left, right = low_rank.factors(x, 4, iterations, 5)
    torch.testing.assert_close((left @ right.T).double(), card(x, 4, iterations, 5), rtol=0, atol=1e-4)
    assert (left.T @ left - torch.eye(4)).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_three_rounds_come_within_5_percent_of_the_best(rank: int, seed: int) -> None:
    x = decaying(96, 64, seed)
    best = torch.linalg.svdvals(x)[rank:].norm().item()
    assert error(x.float(), *low_rank.factors(x, rank, 3, seed)) <= 1.05 * best


def test_matrices_of_a_batch_are_factored_alone() -> None:
    x = torch.stack([decaying(40, 24, s) for s in range(4)]).reshape(2, 2, 40, 24).float()
    left, right = low_rank.factors(x, 3, 3, 0)
    assert (left.shape, right.shape) == ((2, 2, 40, 3), (2, 2, 24, 3))
    for b in range(2):
        for k in range(2):
            one = low_rank.factors(x[b, k], 3, 3, 0)
            torch.testing.assert_close((left @ right.mT)[b, k], one[0] @ one[1].mT, rtol=0, atol=1e-5)


def test_nothing_to_factor_is_nothing() -> None:
    left, right = low_rank.factors(torch.zeros(2, 16, 8), 4, 3, 0)
    assert left.isfinite().all()
    assert torch.equal(right, torch.zeros(2, 8, 4))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_numbers_of_any_size(size: float) -> None:
    x = decaying(32, 16).float()
    left, right = low_rank.factors(x * size, 4, 3, 0)
    torch.testing.assert_close(left @ (right / size).mT, card(x.double(), 4, 3, 0).float(), rtol=0, atol=1e-4)
