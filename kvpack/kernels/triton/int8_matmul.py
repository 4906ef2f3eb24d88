"""Inputs of 8 bits times weights of 8 bits, summed as integers.

A stored code is its number plus 128, so flipping its highest bit makes the int8 that the matrix
unit takes. Scales of groups of channels multiply the integer sums of their channels.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpack.kernels.triton.linear_tiles import new_parts, split_channels, sum_parts
from kvpack.ops.packed_affine import AffineCodes


@triton.jit(do_not_specialize=["N", "each", "steps"])
def _multiply(
    x, x_scale, codes, scale, out, N, R, n_stride, r_stride, scale_stride, each, steps,
    C: tl.constexpr, SIZE: tl.constexpr, GROUPED: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs [BN, BR]: rows of tile `program_id(0)`, inputs of `program_id(1)`, channels of (2)."""
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    live, some = r < R, n < N
    total = tl.zeros([BR, BN], tl.int32)
    acc = tl.zeros([BR, BN], tl.float32)
    first = tl.program_id(2) * each
    for step in tl.range(first, tl.minimum(first + each, steps), num_stages=STAGES):
        c = step * BC + tl.arange(0, BC)
        w_mask, x_mask = live[:, None], some[None, :]
        if C % BC != 0:
            w_mask, x_mask = w_mask & (c < C)[None, :], x_mask & (c < C)[:, None]
        w = tl.load(codes + (r * r_stride)[:, None] + c[None, :], mask=w_mask, other=0)
        y = tl.load(x + (n * n_stride)[None, :] + c[:, None], mask=x_mask, other=0)
        w = (w ^ 128).to(tl.int8, bitcast=True)
        if GROUPED:
            factor = tl.load(scale + r * scale_stride + step * BC // SIZE, mask=live, other=0.0)
            acc += tl.dot(w, y, out_dtype=tl.int32).to(tl.float32) * factor.to(tl.float32)[:, None]
        else:
            total = tl.dot(w, y, total, out_dtype=tl.int32)
    if not GROUPED:
        factor = tl.load(scale + r * scale_stride, mask=live, other=0.0).to(tl.float32)
        acc = total.to(tl.float32) * factor[:, None]
    acc = acc * tl.load(x_scale + n, mask=some, other=0.0).to(tl.float32)[None, :]
    place = tl.program_id(2).to(tl.int64) * N * R + n[None, :] * R + r[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=live[:, None] & some[None, :])


def fits(weight: AffineCodes) -> bool:
    """Whether `int8_matmul` takes this weight: 8 bits, no zero, channels in groups it can sum."""
    symmetric = weight.codes.dim() == 2 and weight.bits == 8 and weight.zero is None
    return symmetric and weight.axis == "channel" and _step(weight) > 0


def int8_matmul(
    x: Tensor, x_scale: Tensor, weight: AffineCodes, dtype: torch.dtype, *, splits: int | None = None
) -> Tensor:
    """(x * x_scale) @ W^T with integer products.

    Args:
        x: int8 [N, C].
        x_scale: [N] or [N, 1], one step for each input, any float dtype.
        weight: symmetric codes of 8 bits of [R, C], one scale a row or for each group of channels
            of a multiple of 32 (the last may be short).
        dtype: of the result.
        splits: programs among which the channels are divided (default: enough to fill the GPU).

    Returns:
        [N, R]. Sums are exact in int32 within a group, for at most 131072 channels.

    Raises:
        ValueError: a weight that `fits` refuses, or shapes that do not belong together.
    """
    if not fits(weight) or weight.channels > 131072:
        raise ValueError(
            "int8 products take symmetric codes of 8 bits, grouped along at most 131072 channels"
        )
    N, C = x.shape
    if weight.channels != C or x_scale.numel() != N or x.dtype != torch.int8:
        raise ValueError(
            f"{x.dtype} inputs {tuple(x.shape)} do not fit a weight of {weight.channels} channels"
        )
    R = weight.tokens
    if not N or not R:
        return x.new_zeros((N, R), dtype=dtype)
    rows, inputs, warps = (64, 16, 4) if N <= 16 else (128, 64 if N <= 64 else 128, 8)
    width, x = _step(weight), x.contiguous()
    tiles, steps = (triton.cdiv(R, rows), triton.cdiv(N, inputs)), triton.cdiv(C, width)
    parts_count, each = split_channels(steps, tiles[0] * tiles[1], x.device, splits)
    parts = new_parts(N, R, parts_count, dtype, x.device)
    _multiply[(*tiles, parts_count)](
        x, x_scale.reshape(N), weight.codes, weight.scale, parts, N, R, C, weight.codes.stride(0),
        weight.scale.stride(0), each, steps, C=C, SIZE=weight.size or C, GROUPED=weight.scale.shape[1] > 1,
        BR=rows, BN=inputs, BC=width, STAGES=4 if N <= 16 else 3, num_warps=warps,
    )  # fmt: skip
    return sum_parts(parts, dtype)


def _step(weight: AffineCodes) -> int:
    """Channels that a step of the loop takes, all of one group; 0 if groups are too uneven."""
    if not weight.size or weight.size >= weight.channels:
        return 128
    return next((width for width in (128, 64, 32) if weight.size % width == 0), 0)
