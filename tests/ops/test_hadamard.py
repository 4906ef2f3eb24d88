"""The matrices are orthonormal and flat, and the fast transform multiplies by them."""

import math

import pytest
import torch

from kvpack.ops import hadamard

SIZES = [1, 2, 3, 5, 7, 8, 12, 20, 28, 36, 44, 48, 64, 80, 96, 100, 112, 128, 256, 384, 512]


@pytest.mark.parametrize("n", SIZES)
def test_matrix_is_orthonormal(n: int) -> None:
    m = hadamard.matrix(n)
    assert torch.allclose(m @ m.T, torch.eye(n, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("n", [n for n in SIZES if n in (1, 2) or (n % 4 == 0 and n != 100)])
def test_hadamard_entries_are_flat(n: int) -> None:
    assert torch.allclose(hadamard.matrix(n).abs() * math.sqrt(n), torch.ones(n, n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 5, 7, 100])
def test_other_entries_are_nearly_flat(n: int) -> None:
    assert (hadamard.matrix(n).abs() * math.sqrt(n)).max() <= math.sqrt(2) + 1e-9


@pytest.mark.parametrize("n", SIZES)
def test_transform_multiplies_by_the_matrix(n: int) -> None:
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n))
    m = hadamard.matrix(n)
    assert torch.allclose(hadamard.transform(x).double(), x.double() @ m.T, atol=1e-5)
    assert torch.allclose(hadamard.transform(x, inverse=True).double(), x.double() @ m, atol=1e-5)


@pytest.mark.parametrize("power", range(10))
def test_powers_of_two_are_sylvester(power: int) -> None:
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1))) / math.sqrt(2)
    assert torch.allclose(hadamard.matrix(2**power), h)


def test_an_outlier_channel_is_spread_evenly() -> None:
    x = torch.zeros(128)
    x[17] = 8.0
    assert torch.allclose(hadamard.transform(x).abs(), torch.full((128,), 8 / math.sqrt(128)))
