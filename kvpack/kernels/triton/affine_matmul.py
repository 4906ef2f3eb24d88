"""Inputs times packed affine weights.

A program makes a tile of outputs, transposed: the weight's rows are the rows of the matrix unit, so
codes go from their bytes to its registers and nowhere else. Where a step of the loop lies within
one group of channels, the group's scale multiplies the finished sums and codes stay exact; else
each code is decoded. Few inputs are bound by the weight's bytes: then the channels are split among
more programs, so that all of the GPU reads.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpack.kernels.triton.bits import dot_type, load_grid, load_units, plane, split_planes, unit, zero_kind
from kvpack.kernels.triton.linear_tiles import new_parts, split_channels, sum_parts
from kvpack.ops.packed_affine import AffineCodes

WHOLE = 1 << 30
"""Rows in a group that is the whole weight."""
FEW = 16
"""Inputs up to which the weight's bytes bound the time."""


@triton.jit
def _input_planes(
    x, n, n_stride, u_stride, j_stride, c0, N,
    C: tl.constexpr, BU: tl.constexpr, UNIT: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """UNIT planes [BU, BN] of inputs from channel `c0` on, zero beyond the last channel."""
    if FEW:  # in channel order, taken apart in registers
        c = c0 + tl.arange(0, BU * UNIT)
        mask = (n < N)[:, None]
        if C % (BU * UNIT) != 0:
            mask = mask & (c < C)[None, :]
        tile = tl.load(x + n[:, None] * n_stride + c[None, :], mask=mask, other=0.0)
        planes = ()
        for j in tl.static_range(UNIT):
            planes += (tl.trans(split_planes(tile, UNIT)[j]),)
    else:  # taken apart before
        u = c0 // UNIT + tl.arange(0, BU)
        mask = (n < N)[None, :]
        if C % (BU * UNIT) != 0:
            mask = mask & (u * UNIT < C)[:, None]
        planes = ()
        for j in tl.static_range(UNIT):
            where = n[None, :] * n_stride + u[:, None] * u_stride + j * j_stride
            planes += (tl.load(x + where, mask=mask, other=0.0),)
    return planes


@triton.jit
def _grouped_step(
    acc, word, planes, scale, zero, offsets, live,
    UNIT: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add channels of one group: scale and offset belong to whole rows, `offsets` [BR]."""
    raw = tl.zeros_like(acc)
    for j in tl.static_range(UNIT):
        raw = tl.dot(plane(word, j, BITS, DOT), planes[j].to(DOT), raw, input_precision="ieee")
    step, shift = load_grid(scale, zero, offsets, live, BITS, ZERO)
    acc += raw * step[:, None]
    if ZERO != 0:
        sums = tl.zeros_like(planes[0].to(tl.float32))
        for j in tl.static_range(UNIT):
            sums += planes[j].to(tl.float32)
        acc += shift[:, None] * tl.sum(sums, 0)[None, :]
    return acc


@triton.jit
def _decoded_step(
    acc, word, planes, scale, zero, r, live, c0, stride, C,
    SIZE: tl.constexpr, BY_ROW: tl.constexpr, BU: tl.constexpr, UNIT: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add channels whose grids differ, by decoding the codes. `BY_ROW`: groups are runs of rows."""
    u = tl.arange(0, BU)
    for j in tl.static_range(UNIT):
        c = (c0 + u * UNIT + j)[None, :]
        offsets = (r // SIZE)[:, None] * stride + c if BY_ROW else r[:, None] * stride + c // SIZE
        step, shift = load_grid(scale, zero, offsets, live[:, None] & (c < C), BITS, ZERO)
        weight = (plane(word, j, BITS, tl.float32) * step + shift).to(DOT)
        acc = tl.dot(weight, planes[j].to(DOT), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["N", "each", "steps"])
def _multiply(
    x, codes, scale, zero, out, N, R, n_stride, u_stride, j_stride, r_stride, scale_stride, each, steps,
    C: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, UNIT_BYTES: tl.constexpr, ZERO: tl.constexpr,
    SIZE: tl.constexpr, BY_ROW: tl.constexpr, GROUPED: tl.constexpr, FEW: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs [BN, BR]: rows of tile `program_id(0)`, inputs of `program_id(1)`, channels of (2)."""
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    u = tl.arange(0, BU)
    live = r < R
    # Units in a row if steps take all of them, else 0: some bytes may lie behind the row.
    ROW_UNITS: tl.constexpr = C // UNIT if C % (BU * UNIT) == 0 else 0
    acc = tl.zeros([BR, BN], tl.float32)
    first = tl.program_id(2) * each
    for step in tl.range(first, tl.minimum(first + each, steps), num_stages=STAGES):
        c0 = step * (BU * UNIT)
        byte = (step * BU + u) * UNIT_BYTES
        word = load_units(codes + (r * r_stride)[:, None], byte[None, :], live[:, None], C, ROW_UNITS, BITS)
        planes = _input_planes(x, n, n_stride, u_stride, j_stride, c0, N, C, BU, UNIT, FEW)
        if GROUPED:
            offsets = r * scale_stride + c0 // SIZE
            acc = _grouped_step(acc, word, planes, scale, zero, offsets, live, UNIT, BITS, ZERO, DOT)
        else:
            acc = _decoded_step(
                acc, word, planes, scale, zero, r, live, c0, scale_stride, C,
                SIZE, BY_ROW, BU, UNIT, BITS, ZERO, DOT,
            )  # fmt: skip
    place = tl.program_id(2).to(tl.int64) * N * R + n[None, :] * R + r[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


def fits(weight: AffineCodes) -> bool:
    """Whether `affine_matmul` takes this weight: any affine matrix."""
    return weight.codes.dim() == 2


def affine_matmul(x: Tensor, weight: AffineCodes, *, splits: int | None = None) -> Tensor:
    """Multiply x @ W^T.

    Args:
        x: [N, C], float16, bfloat16 or float32.
        weight: codes of [R, C], rows contiguous; any bits, zero and grouping.
        splits: programs among which the channels are divided (default: enough to fill the GPU).

    Returns:
        [N, R] in x's dtype; sums are float32. Codes meet x in x's dtype, in which they are exact;
        decoded weights, where groups do not align with the loop, are rounded to it.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if not fits(weight) or x.dim() != 2 or x.shape[1] != weight.channels:
        raise ValueError(f"inputs {tuple(x.shape)} do not fit a weight of {weight.channels} channels")
    N, C = x.shape
    R = weight.tokens
    if not N or not R:
        return x.new_zeros(N, R)
    count, unit_bytes = unit(weight.bits)
    few = N <= FEW
    rows, inputs, warps = (64, 16, 4) if few else (128, 64 if N <= 64 else 128, 8)
    units, grouped = _step(weight, count)
    steps = -(-C // (units * count))
    tiles = triton.cdiv(R, rows), triton.cdiv(N, inputs)
    parts_count, each = split_channels(steps, tiles[0] * tiles[1], x.device, splits)
    parts = new_parts(N, R, parts_count, x.dtype, x.device)
    x, strides = _in_planes(x, count, few)
    scale, zero = _grids(weight)
    _multiply[(*tiles, parts_count)](
        x, weight.codes, scale, zero, parts, N, R, *strides,
        weight.codes.stride(0), scale.stride(0), each, steps,
        C=C, BITS=weight.bits, UNIT=count, UNIT_BYTES=unit_bytes, ZERO=zero_kind(weight.zero),
        SIZE=_size(weight),
        BY_ROW=weight.axis == "token", GROUPED=grouped, FEW=few, BR=rows, BN=inputs, BU=units,
        DOT=dot_type(x.dtype), STAGES=4 if few else 3, num_warps=warps,
    )  # fmt: skip
    return sum_parts(parts, x.dtype)


def _size(weight: AffineCodes) -> int:
    if weight.axis == "token":
        return weight.size or WHOLE
    return min(weight.size or weight.channels, weight.channels)


def _step(weight: AffineCodes, codes: int) -> tuple[int, bool]:
    """Units that a step of the loop takes, at least 16, and whether they share one grid entry."""
    size, most = _size(weight), max(16, 128 // codes)
    if weight.axis == "token":
        return most, False
    if size >= weight.channels:
        return most, True
    for units in (most, most // 2, most // 4):
        if units >= 16 and size % (units * codes) == 0:
            return units, True
    return most, False


def _in_planes(x: Tensor, codes: int, few: bool) -> tuple[Tensor, tuple[int, int, int]]:
    """Inputs as the kernel reads them, and strides of inputs, units and planes."""
    if few or codes == 1:
        x = x if x.stride(1) == 1 else x.contiguous()
        return x, (x.stride(0), codes, 1)
    missing = -x.shape[1] % codes
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    planes = padded.view(x.shape[0], -1, codes).mT.contiguous()
    return planes, (planes.stride(0), 1, planes.stride(1))


def _grids(weight: AffineCodes) -> tuple[Tensor, Tensor]:
    zero = weight.scale if weight.zero is None else weight.zero
    if weight.scale.stride() == zero.stride() and zero.stride(1) == 1:
        return weight.scale, zero
    return weight.scale.contiguous(), zero.contiguous()
