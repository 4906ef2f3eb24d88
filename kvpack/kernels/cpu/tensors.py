"""How compiled loops are told of tensors: kinds of numbers and zeros, addresses and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.kernels.cpu import frames

KINDS = {
    torch.float32: frames.FLOAT32,
    torch.float16: frames.FLOAT16,
    torch.bfloat16: frames.BFLOAT16,
    torch.float8_e4m3fn: frames.FLOAT8,
}


def zeros(zero: Tensor | None) -> int:
    """How the zeros of a grid are meant."""
    if zero is None:
        return frames.CENTRED
    return frames.OFFSET if zero.dtype.is_floating_point else frames.CENTRED_INTEGER


def place(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address and strides in bytes of the axes b, k and row; 0 for an axis that is not there."""
    size, strides = tensor.element_size(), tensor.stride()
    b = strides[-4] if len(strides) > 3 else 0
    k = strides[-3] if len(strides) > 2 else 0
    return tensor.data_ptr(), b * size, k * size, strides[-2] * size
