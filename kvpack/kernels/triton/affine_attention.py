"""Decode attention over keys and values that are affine codes.

The tokens are split among programs (flash decoding): each runs an online softmax over its part and
leaves sums that a second kernel joins. Codes are read once, steps are never multiplied into them
(`attention_steps`), and nothing decoded is written to memory.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpack.kernels.triton.attention_plan import (
    Side,
    fits,
    padded_heads,
    split_tokens,
    tile_tokens,
)
from kvpack.kernels.triton.attention_steps import (
    MINUS_INFINITY,
    key_rows,
    load_query,
    masked,
    no_sums,
    soften,
    tile_scores,
    tile_sums,
)
from kvpack.ops.packed_affine import AffineCodes


@triton.jit(do_not_specialize=["start", "stop", "first", "chunk"])
def _attend(
    query, keys, key_scale, key_zero, values, value_scale, value_zero, mask, out, maximum, total,
    q_b, q_h, q_m, k_b, k_h, ks_b, ks_h, v_b, v_h, vs_b, vs_h, mask_b,
    heads, M, start, stop, first, chunk, scale, softcap,
    K_T: tl.constexpr, KS_T: tl.constexpr, KD: tl.constexpr, K_TOKEN: tl.constexpr, K_SIZE: tl.constexpr,
    K_I: tl.constexpr, K_U: tl.constexpr, K_N: tl.constexpr, K_UB: tl.constexpr, K_BITS: tl.constexpr,
    K_ZERO: tl.constexpr,
    V_T: tl.constexpr, VS_T: tl.constexpr, VD: tl.constexpr, V_TOKEN: tl.constexpr, V_SIZE: tl.constexpr,
    V_I: tl.constexpr, V_U: tl.constexpr, V_N: tl.constexpr, V_UB: tl.constexpr, V_BITS: tl.constexpr,
    V_ZERO: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: kv head `program_id(0)`, tokens of split `program_id(1)`."""
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    keys, key_scale, key_zero = _head(keys, key_scale, key_zero, b, h, k_b, k_h, ks_b, ks_h)
    values, value_scale, value_zero = _head(values, value_scale, value_zero, b, h, v_b, v_h, vs_b, vs_h)
    q, power = load_query(query + b * q_b + h * q_h, q_m, M, KD, MP, K_U, K_N, DOT)
    rows, sums = key_rows(q, K_TOKEN, K_SIZE, K_I, MP, K_U, K_N, DOT)
    running, weight = tl.full([MP], MINUS_INFINITY, tl.float32), tl.zeros([MP, TILE], tl.float32)
    acc, offsets, peak = no_sums(V_TOKEN, V_I, V_U, V_N, MP, TILE, DOT)
    begin = first + tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, stop)
    for tile in tl.range(begin, end, TILE, num_stages=STAGES):
        t = tile + tl.arange(0, TILE)
        live = (t >= start) & (t < end)
        s = tile_scores(
            q, rows, sums, keys, key_scale, key_zero, tile, live, stop, K_T, KS_T, KD, K_TOKEN, K_SIZE,
            K_I, K_U, K_N, K_UB, K_BITS, K_ZERO, MP, TILE, DOT,
        )  # fmt: skip
        s = masked(s, power * scale, softcap, mask + b * mask_b, t - start, live, SOFTCAP, MASK)
        running, weight, alpha, p = soften(s, running, weight)
        acc, offsets, peak = tile_sums(
            acc, offsets, peak, p, alpha, values, value_scale, value_zero, tile, live, stop, V_T, VS_T, VD,
            V_TOKEN, V_SIZE, V_I, V_U, V_N, V_UB, V_BITS, V_ZERO, MP, TILE, DOT,
        )  # fmt: skip
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * M
    _store(acc, tl.sum(offsets, 2), peak, out + place * VD, M, VD, V_TOKEN, V_SIZE, V_I, V_U, V_N, MP)
    _store_weight(running, weight, maximum + place, total + place, M, MP)


@triton.jit
def _head(codes, scale, zero, b, h, code_b, code_h, grid_b, grid_h):
    """Where codes and grids of kv head `h` of batch row `b` begin."""
    grids = b * grid_b + h * grid_h
    return codes + b * code_b + h * code_h, scale + grids, zero + grids


@triton.jit
def _store_weight(running, weight, maximum, total, M, MP: tl.constexpr):
    """Write the greatest score and the sum of the weights of every query head."""
    m = tl.arange(0, MP)
    tl.store(maximum + m, running * 0.6931471805599453, mask=m < M)
    tl.store(total + m, tl.sum(weight, 1), mask=m < M)


@triton.jit
def _store(
    acc, offsets, peak, out, M, D: tl.constexpr,
    TOKEN: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
    MP: tl.constexpr,
):  # fmt: skip
    """Write planes as rows [M, D]; of grouped channels those in their own group."""
    u = tl.arange(0, U)
    for j in tl.static_range(N):
        d = u * N + j
        if TOKEN:
            m = tl.arange(0, MP)
            tl.store(out + m[:, None] * D + d[None, :], acc[j], mask=(m < M)[:, None] & (d < D)[None, :])
        else:
            row = tl.arange(0, GROUPS * MP)
            m, i = row % MP, row // MP
            unit_step = tl.reshape(tl.broadcast_to(peak[:, None], [GROUPS, MP]), [GROUPS * MP])
            x = acc[j] * unit_step[:, None] + tl.reshape(offsets, [GROUPS * MP])[:, None]
            own = (d // SIZE)[None, :] == i[:, None]
            tl.store(out + m[:, None] * D + d[None, :], x, mask=own & (m < M)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _join(
    parts, part_maximum, part_total, out, maximum, total, M, D, splits,
    DP: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the splits of query head `program_id(1)` of kv head `program_id(0)`."""
    m = tl.program_id(1)
    place = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SP), tl.arange(0, DP)
    base = place * splits * M + m
    peaks = tl.load(part_maximum + base + s * M, mask=s < splits, other=MINUS_INFINITY)
    peak = tl.max(peaks, 0)
    safe = tl.where(peak == MINUS_INFINITY, 0.0, peak)
    totals = tl.load(part_total + base + s * M, mask=s < splits, other=0.0)
    acc = tl.zeros([DP], tl.float32)
    for first in range(0, splits, BLOCK):
        some = first + tl.arange(0, BLOCK)
        ok = some < splits
        weights = tl.exp(tl.load(part_maximum + base + some * M, mask=ok, other=MINUS_INFINITY) - safe)
        x = tl.load(
            parts + (base + some[:, None] * M) * D + d[None, :],
            mask=ok[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc += tl.sum(x * weights[:, None], 0)
    tl.store(out + (place * M + m) * D + d, acc, mask=d < D)
    tl.store(maximum + place * M + m, peak)
    tl.store(total + place * M + m, tl.sum(totals * tl.exp(peaks - safe), 0))


def affine_attention(
    query: Tensor,
    keys: AffineCodes,
    values: AffineCodes,
    *,
    start: int = 0,
    tokens: int | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised attention of a query over a range of coded tokens.

    Args:
        query: [B, K, M, D], float16, bfloat16 or float32; M rows share a kv head.
        keys: buffers [B, K, capacity, ...] with any strides, whose rows are contiguous; groups
            along tokens count from the start of the buffer.
        values: the same, of as many tokens; D may differ.
        start: first token of the range.
        tokens: length of the range (default: all from `start`).
        mask: additive [B, tokens] of any float dtype, -inf for what is not to be read.
        scale: factor on the scores (default D^-1/2).
        softcap: bound of a tanh on the scores; 0 is none.
        splits: programs among which the tokens are divided (default: enough to fill the GPU).

    Returns:
        float32 acc [B, K, M, Dv], maximum [B, K, M] and total [B, K, M]: the attention is
        acc / total, and parts are joined with the weights exp(maximum - greatest maximum). Where
        nothing was read, maximum is -inf and the rest 0. With float16 or bfloat16 queries the
        products are float16 with float32 sums (keys' steps below 32000), with float32 queries
        float32 throughout.

    Raises:
        ValueError: shapes that do not belong together, or that `fits` refuses.
    """
    stop = keys.tokens if tokens is None else start + tokens
    B, K, M, D = query.shape
    _check(query, keys, values, mask, start, stop)
    tile = tile_tokens(keys, values, M, query.dtype)
    first = start - start % tile  # so that a tile holds whole groups, or lies in one
    split_count, chunk = split_tokens(stop - first, tile, B * K, query.device, splits)
    shape = (B * K * split_count, M)
    parts = query.new_empty((*shape, values.channels), dtype=torch.float32)
    maxima, totals = parts.new_empty(shape), parts.new_empty(shape)
    k, v = Side(keys, tile), Side(values, tile)
    _attend[(B * K, split_count)](
        query, keys.codes, k.scale, k.zero, values.codes, v.scale, v.zero,
        query if mask is None else mask, parts, maxima, totals,
        *query.stride()[:3], *keys.codes.stride()[:2], *k.scale.stride()[:2],
        *values.codes.stride()[:2], *v.scale.stride()[:2], 0 if mask is None else mask.stride(0),
        K, M, start, stop, first, chunk, D**-0.5 if scale is None else scale, softcap,
        *k.constants, *v.constants,
        MP=padded_heads(M, k.groups, v.groups), TILE=tile,
        DOT=tl.float32 if query.dtype == torch.float32 else tl.float16,
        SOFTCAP=softcap > 0, MASK=mask is not None, STAGES=3, num_warps=4,
    )  # fmt: skip
    if split_count == 1:
        return parts.view(B, K, M, -1), maxima.view(B, K, M), totals.view(B, K, M)
    return _joined(parts, maxima, totals, split_count, (B, K, M))


def _joined(
    parts: Tensor, maxima: Tensor, totals: Tensor, splits: int, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    B, K, M = shape
    D = parts.shape[-1]
    acc = parts.new_empty((B, K, M, D))
    maximum, total = parts.new_empty(shape), parts.new_empty(shape)
    _join[(B * K, M)](
        parts, maxima, totals, acc, maximum, total, M, D, splits,
        DP=triton.next_power_of_2(D), SP=triton.next_power_of_2(splits), BLOCK=16, num_warps=4,
    )  # fmt: skip
    return acc, maximum, total


def _check(
    query: Tensor, keys: AffineCodes, values: AffineCodes, mask: Tensor | None, start: int, stop: int
) -> None:
    B, K, M, D = query.shape
    if not fits(keys, values, M):
        raise ValueError(f"no kernel for keys {keys.codes.shape}, values {values.codes.shape} and {M} heads")
    if (*keys.codes.shape[:2], keys.channels) != (B, K, D):
        raise ValueError(f"queries {tuple(query.shape)} do not fit keys of {keys.channels} channels")
    if not 0 <= start <= stop <= min(keys.tokens, values.tokens):
        raise ValueError(f"tokens {start} to {stop} are not all among {min(keys.tokens, values.tokens)}")
    if any(x.stride(-1) != 1 for x in (query, keys.codes, values.codes)):
        raise ValueError("rows of queries and codes must be contiguous")
    if mask is not None and (tuple(mask.shape) != (B, stop - start) or mask.stride(-1) != 1):
        raise ValueError(f"the mask must be contiguous [{B}, {stop - start}], not {tuple(mask.shape)}")
