"""Tests. Without a GPU Triton's kernels run through its interpreter.

That must be asked for before triton is first imported, and transformers imports it.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
