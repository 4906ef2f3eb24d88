"""The real Fourier transform is orthonormal and stores no number twice."""

import math

import pytest
import torch

from kvpack.ops import fourier
from tests.contracts.discovery import random

LENGTHS = [1, 2, 3, 4, 5, 8, 24, 31, 40, 63, 64, 80, 128]


def slow(x: torch.Tensor) -> torch.Tensor:
    """The layout of the module's docstring, bin by bin."""
    length = x.shape[-1]
    n = torch.arange(length, dtype=torch.float64)
    rows = [torch.full((length,), 1 / math.sqrt(length), dtype=torch.float64)]
    for k in range(1, length // 2 + 1):
        angle = 2 * math.pi * k * n / length
        if 2 * k == length:
            rows.append(angle.cos() / math.sqrt(length))
        else:
            rows += [angle.cos() * math.sqrt(2 / length), -angle.sin() * math.sqrt(2 / length)]
    return x.double() @ torch.stack(rows).T


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_fourier_matrix(length: int) -> None:
    x = random(2, 3, length)
    y = fourier.forward(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.double(), slow(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_inverse_and_length_of_vectors(length: int) -> None:
    x = random(4, length)
    y = fourier.forward(x)
    torch.testing.assert_close(fourier.inverse(y), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_a_vector_does_not_depend_on_its_batch() -> None:
    x = random(64, 40)
    assert torch.equal(fourier.forward(x)[17], fourier.forward(x[17]))


def test_half_precision_is_transformed_precisely() -> None:
    x = random(4, 48).bfloat16()
    assert torch.equal(fourier.forward(x), fourier.forward(x.float()))
