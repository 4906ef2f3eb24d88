"""Triton's kernels: on a GPU where there is one, else through the interpreter."""
