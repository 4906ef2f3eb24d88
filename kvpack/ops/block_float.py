"""Block floating point: signed mantissas that share one power of two per block of channels.

With m mantissa bits and E = floor(log2(max |x|)) of a block, the step is 2^(E - (m - 2)), codes are
q = clamp(round_half_even(x / step), -(2^(m-1) - 1), 2^(m-1) - 1) and x^ = q * step. Exponents are
stored as E + 127; the code 0 is a block of zeros, which every block below 2^-126 becomes.
Source: arXiv 2403.20137, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

BIAS = 127
LARGEST = 254
"""Exponent code of numbers from 2^127 on, the last below infinity."""


def exponents(peak: Tensor) -> Tensor:
    """Exponent codes uint8 of blocks whose greatest magnitude is `peak` (float32, any shape)."""
    _, power = torch.frexp(peak)
    code = (power.int() - 1 + BIAS).clamp(max=LARGEST)
    return torch.where((peak > 0) & (code > 0), code, 0).to(torch.uint8)


def steps(exponent: Tensor, mantissa: int) -> Tensor:
    """Distance of neighbouring numbers, float32; 0 in blocks of zeros."""
    # The bits of 2^E itself; the step may be subnormal, which an exact product gives as well.
    power = (exponent.int() << 23).view(torch.float32)
    return power * 2.0 ** (2 - mantissa)


def codes(x: Tensor, step: Tensor, mantissa: int) -> Tensor:
    """Codes of `x`, uint8: q + 2^(m-1); `step` broadcasts against `x`."""
    top = 2 ** (mantissa - 1) - 1
    # Dividing by a power of two is exact; a block of zeros has none, and only zeros.
    q = (x / step).round_().nan_to_num_(0.0).clamp_(-top, top)
    return torch.where(step > 0, q, 0.0).add_(top + 1).to(torch.uint8)


def values(q: Tensor, step: Tensor, mantissa: int) -> Tensor:
    """The numbers that codes stand for, float32."""
    return q.float().sub_(2 ** (mantissa - 1)).mul_(step)
