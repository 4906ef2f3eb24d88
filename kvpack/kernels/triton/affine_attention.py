"""Decode attention over keys and values that are affine codes.

The tokens are split among programs (flash decoding): each runs an online softmax over its part and
leaves sums that a second kernel joins. Codes are read once, steps are never multiplied into them
(`attention_steps`), and nothing decoded is written to memory.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300
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
    channel_rows,
    load_query,
    masked,
    mix_by_channel,
    mix_by_token,
    scores_by_channel,
    scores_by_token,
    soften,
)
from kvpack.kernels.triton.bits import load_units
from kvpack.ops.packed_affine import AffineCodes


@triton.jit(do_not_specialize=["start", "stop", "first", "chunk"])
def _attend(
    query, keys, key_scale, key_zero, values, value_scale, value_zero, mask, out, maximum, total,
    q_b, q_h, q_m, k_b, k_h, ks_b, ks_h, v_b, v_h, vs_b, vs_h, mask_b,
    heads, M, start, stop, first, chunk, scale, softcap,
    K_T: tl.constexpr, KS_T: tl.constexpr, KD: tl.constexpr, K_TOKEN: tl.constexpr,
    K_SIZE: tl.constexpr, K_I: tl.constexpr, K_U: tl.constexpr,
    K_N: tl.constexpr, K_UB: tl.constexpr, K_BITS: tl.constexpr, K_ZERO: tl.constexpr,
    V_T: tl.constexpr, VS_T: tl.constexpr, VD: tl.constexpr, V_TOKEN: tl.constexpr,
    V_SIZE: tl.constexpr, V_I: tl.constexpr, V_U: tl.constexpr,
    V_N: tl.constexpr, V_UB: tl.constexpr, V_BITS: tl.constexpr, V_ZERO: tl.constexpr,
    MP: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr, SOFTCAP: tl.constexpr,
    MASK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: kv head `program_id(0)`, tokens of split `program_id(1)`."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    split = tl.program_id(1)
    keys += b * k_b + h * k_h
    grids = b * ks_b + h * ks_h
    key_scale, key_zero = key_scale + grids, key_zero + grids
    values += b * v_b + h * v_h
    grids = b * vs_b + h * vs_h
    value_scale, value_zero = value_scale + grids, value_zero + grids
    mask += b * mask_b
    q, power = load_query(query + b * q_b + h * q_h, q_m, M, KD, MP, K_U, K_N, DOT)
    factor = power * scale
    rows, sums = (), ()
    if not K_TOKEN:
        rows, sums = channel_rows(q, K_SIZE, K_I, MP, K_U, K_N, DOT)

    ku, vu = tl.arange(0, K_U), tl.arange(0, V_U)
    running = tl.full([MP], MINUS_INFINITY, tl.float32)
    weight = tl.zeros([MP, TILE], tl.float32)
    V_ROWS: tl.constexpr = MP if V_TOKEN else V_I * MP
    acc = ()
    for _ in tl.static_range(V_N):
        acc += (tl.zeros([V_ROWS, V_U], tl.float32),)
    offsets = tl.zeros([V_I, MP, TILE], tl.float32)
    peak = tl.full([V_I], 1.0 if DOT == tl.float32 else 1e-30, tl.float32)

    begin = first + split * chunk
    end = tl.minimum(begin + chunk, stop)
    r = tl.arange(0, TILE)
    for tile in tl.range(begin, end, TILE, num_stages=STAGES):
        t = tile + r
        live = (t >= start) & (t < end)
        at = tl.full([], 0, tl.int64) + tile
        word = load_units(
            keys + at * K_T + (r * K_T)[None, :], (ku * K_UB)[:, None], live[None, :], KD, K_U, K_BITS
        )
        if K_TOKEN:
            at = at // K_SIZE
            s = scores_by_token(
                q, word, key_scale + at * KS_T, key_zero + at * KS_T, t // K_SIZE - tile // K_SIZE, KS_T,
                (stop - 1) // K_SIZE - tile // K_SIZE, KD, K_I, MP, K_U, K_N, TILE, K_BITS, K_ZERO, DOT,
            )  # fmt: skip
        else:
            s = scores_by_channel(
                rows, sums, word, key_scale + at * KS_T, key_zero + at * KS_T, r, KS_T, live,
                (KD + K_SIZE - 1) // K_SIZE, K_I, MP, K_N, TILE, K_BITS, K_ZERO, DOT,
            )  # fmt: skip
        s = masked(s, factor, softcap, mask, t - start, live, SOFTCAP, MASK)
        running, weight, alpha, p = soften(s, running, weight)
        at = tl.full([], 0, tl.int64) + tile
        word = load_units(
            values + at * V_T + (r * V_T)[:, None], (vu * V_UB)[None, :], live[:, None], VD, V_U, V_BITS
        )
        if V_TOKEN:
            at = at // V_SIZE
            acc = mix_by_token(
                acc, p, alpha, word, value_scale + at * VS_T, value_zero + at * VS_T,
                t // V_SIZE - tile // V_SIZE, VS_T, (stop - 1) // V_SIZE - tile // V_SIZE, VD,
                V_I, MP, V_U, V_N, TILE, V_BITS, V_ZERO, DOT,
            )  # fmt: skip
        else:
            acc, offsets, peak = mix_by_channel(
                acc, offsets, peak, p, alpha, word, value_scale + at * VS_T, value_zero + at * VS_T,
                r, VS_T, live, (VD + V_SIZE - 1) // V_SIZE, V_I, MP, V_N, TILE, V_BITS, V_ZERO, DOT,
            )  # fmt: skip

    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split) * M
    _store(
        acc, tl.sum(offsets, 2), peak, out + place * VD, M, VD, V_TOKEN, V_SIZE, V_I, V_U, V_N, MP
    )  # fmt: skip
    m = tl.arange(0, MP)
    tl.store(maximum + place + m, running * 0.6931471805599453, mask=m < M)
    tl.store(total + place + m, tl.sum(weight, 1), mask=m < M)


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
