"""Kernels for CPUs, compiled at run time by numba for the processor that is there.

Hot loops are emitted as LLVM vector code; everything runs on torch's own threads. Compiled code is
cached on disk, under a key that covers all files of this package.
"""
