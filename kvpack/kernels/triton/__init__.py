"""GPU kernels that read the stored layout, in Triton.

They compute what `kvpack.ops.affine` followed by a product would, without ever writing decoded
numbers to memory. Nothing here imports triton until one of its modules is imported: triton comes
with torch's CUDA wheels and is never a dependency. Without a GPU the kernels run through Triton's
interpreter (`TRITON_INTERPRET=1`, set before triton is first imported): correct, and very slow.

- `affine_attention.affine_attention`: decode attention over affine keys and values
- `affine_matmul.affine_matmul`: x @ W^T with packed affine weights
- `int8_matmul.int8_matmul`: the same with int8 inputs and int32 sums
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor


def interpreting() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def available(tensor: Tensor | None = None) -> bool:
    """Whether the kernels can run here, and on `tensor` if one is given.

    That takes triton and a CUDA GPU of compute capability 8.0 or above, or Triton's interpreter.
    """
    if find_spec("triton") is None:
        return False
    if interpreting():
        return tensor is None or tensor.device.type == "cpu"
    if tensor is not None and tensor.device.type != "cuda":
        return False
    device = None if tensor is None else tensor.device
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
