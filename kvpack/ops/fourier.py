"""The orthonormal Fourier transform of real vectors, in as many real numbers as they have entries.

The spectrum of E real numbers is conjugate symmetric: bin 0 and, for even E, bin E/2 are real, and
bins above E/2 repeat those below. What remains is laid out as Re 0, Re 1, Im 1, Re 2, Im 2, ... and,
for even E, Re E/2 last: E numbers. The pairs carry a factor sqrt(2) for their mirror images, which
makes the transform orthonormal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(x: Tensor) -> Tensor:
    """Spectrum of the last axis, float32 [..., E] of [..., E]; computed in float64.

    The wide format also keeps a vector's result from depending on the batch around it.
    """
    length = x.shape[-1]
    bins = torch.view_as_real(torch.fft.rfft(x.double(), norm="ortho")).flatten(-2)
    return (torch.cat((bins[..., :1], bins[..., 2 : length + 1]), -1) * _weights(length, x.device)).float()


def inverse(y: Tensor) -> Tensor:
    """Invert `forward`, float32 [..., E]."""
    length = y.shape[-1]
    bins = y.double() / _weights(length, y.device)
    zero = bins.new_zeros((*y.shape[:-1], 1))
    # Imaginary parts that are zero by symmetry: of bin 0, and of bin E/2 for even E.
    bins = torch.cat((bins[..., :1], zero, bins[..., 1:], *([zero] if length % 2 == 0 else [])), -1)
    spectrum = torch.view_as_complex(torch.unflatten(bins, -1, (bins.shape[-1] // 2, 2)))
    x: Tensor = torch.fft.irfft(spectrum, n=length, norm="ortho")
    return x.float()


def _weights(length: int, device: torch.device) -> Tensor:
    weights = torch.full((length,), math.sqrt(2), dtype=torch.float64, device=device)
    weights[0] = 1
    if length % 2 == 0:
        weights[-1] = 1
    return weights
