"""Orthonormal Hadamard transforms of any length.

A length n = m * 2^p uses H_m (x) S_{2^p} / sqrt(n), S being Sylvester's matrix. H_m is the 1x1
matrix for powers of two; else a Hadamard matrix of order 4*odd by one of Paley's constructions
(12, 20, 28, 36, 44, ...); else the discrete Hartley matrix cas(2 pi j k / m) / sqrt(m) of the odd
order, whose entries are at most sqrt(2) larger than a Hadamard matrix's. Not all are symmetric, so
forward and inverse differ.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def transform(x: Tensor, *, inverse: bool = False) -> Tensor:
    """Multiply the last axis by the orthonormal matrix of its length, or by its transpose.

    Each vector's result depends on that vector only, bit for bit, never on the batch around it: a
    cache must hold the same codes whether tokens came together or one by one. Hence additions in a
    fixed order rather than a matrix product, except for H_m, whose product runs in float64.

    Args:
        x: [..., n].
        inverse: multiply by the transpose.

    Returns:
        float32 [..., n].
    """
    n = x.shape[-1]
    order, power = _factors(n)
    # With the vectors as columns every step works on long contiguous runs.
    columns = x.float().reshape(-1, n).T.clone(memory_format=torch.contiguous_format)
    if order > 1:
        base = _base(order).to(x.device)
        columns = ((base.T if inverse else base) @ columns.view(order, -1).double()).float()
    columns = _sylvester(columns.view(order, power, -1)).view(n, -1)
    return columns.T.mul(1 / math.sqrt(power)).reshape(x.shape)


def matrix(n: int) -> Tensor:
    """The orthonormal matrix M with ``transform(x) == M @ x``, float64 [n, n]."""
    order, power = _factors(n)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < power:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    return torch.kron(_base(order), sylvester / math.sqrt(power))


def _sylvester(columns: Tensor) -> Tensor:
    """Unscaled Walsh-Hadamard transform of the middle axis [m, n, N], in log2(n) passes over `columns`."""
    order, n, _ = columns.shape
    half = n // 2
    while half:
        pairs = columns.view(order * n // (2 * half), 2, -1)
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = upper - lower
        upper.add_(lower)
        lower.copy_(difference)
        half //= 2
    return columns


def _factors(n: int) -> tuple[int, int]:
    """Split n into the order of H_m and a power of two."""
    power = n & -n
    odd = n // power
    if odd > 1 and power >= 4 and _paley_prime(4 * odd):
        return 4 * odd, power // 4
    return odd, power


@functools.cache
def _base(order: int) -> Tensor:
    """H_m, orthonormal, float64."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0:
        return _paley(order) / math.sqrt(order)
    index = torch.arange(order, dtype=torch.float64)
    angle = index.outer(index) % order * (2 * math.pi / order)
    return (angle.cos() + angle.sin()) / math.sqrt(order)


def _paley_prime(order: int) -> int:
    """The prime of Paley's first or second construction of `order`; 0 when neither exists."""
    if _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and _is_prime(half) else 0


def _paley(order: int) -> Tensor:
    """A matrix of +1 and -1 with orthogonal rows, for an order divisible by 4.

    Q[i, j] = chi(i - j) is the Jacobsthal matrix of a prime q. First construction (q = 3 mod 4):
    I + [[0, 1], [-1, Q]]. Second (q = 1 mod 4): the symmetric C = [[0, 1], [1, Q]] with each entry
    replaced by a 2x2 block. Source: Paley, On Orthogonal Matrices, 1933.
    """
    prime = _paley_prime(order)
    squares = {i * i % prime for i in range(1, prime)}
    chi = [0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)]
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[1:, 1:] = torch.tensor([[chi[(i - j) % prime] for j in range(prime)] for i in range(prime)])
    core[0, 1:] = 1
    eye = torch.eye(prime + 1, dtype=torch.float64)
    if prime == order - 1:
        core[1:, 0] = -1
        return eye + core
    core[1:, 0] = 1
    on_diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    elsewhere = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, elsewhere) + torch.kron(eye, on_diagonal)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))
