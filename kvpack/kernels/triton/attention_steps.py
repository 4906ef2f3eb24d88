"""The steps of decode attention over one tile of tokens, inside a kernel.

A group's step cannot be taken into the codes without touching every code, so it is taken into the
other factor of the product, once for each group that a tile holds. The matrix unit's rows, of which
a few query heads would fill a fraction, are pairs (group i, query head m):

- keys grouped along tokens:     A[(i,m), d] = q[m,d] * step[i,d], kept where token t is in group i
- keys grouped along channels:   A[(i,m), d] = q[m,d] where channel d is in group i, else 0; the
                                 result is multiplied with step[i,t] and summed over i
- values grouped along channels: A[(i,m), t] = p[m,t] * step[i,t], kept where channel d is in group i
- values grouped along tokens:   A[(i,m), t] = p[m,t] where token t is in group i, else 0; the
                                 result is multiplied with step[i,d] and summed over i

Offsets of the grids are sums of q or p, and never meet a code. Half-precision products are float16
whatever the model's dtype: queries are divided by a power of two and the weights p * step by the
largest step so far, as an online softmax does with its maximum, so nothing overflows.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300
from __future__ import annotations

import triton
import triton.language as tl

from kvpack.kernels.triton.bits import load_grid, load_units, plane, split_planes

MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def load_query(
    query, stride, M, D: tl.constexpr, MP: tl.constexpr, U: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr
):
    """Query heads in N planes of float32 [MP, U], and the power of two [MP] they were divided by."""
    m, d = tl.arange(0, MP)[:, None], tl.arange(0, U * N)[None, :]
    x = tl.load(query + m * stride + d, mask=(m < M) & (d < D), other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(x), 1)
    exponent = peak.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.where(exponent == 0, 1.0, exponent.to(tl.float32, bitcast=True))
    if DOT == tl.float32:
        power = tl.full([MP], 1.0, tl.float32)
    return split_planes(x / power[:, None], N), power


@triton.jit
def grid_planes(
    scale, zero, i, stride: tl.constexpr, last, D: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Steps and offsets of token groups `i`, none after `last`: N planes [GROUPS, U] each."""
    d = tl.arange(0, U * N)
    mask = (i <= last)[:, None]
    if U * N != D:
        mask = mask & (d < D)[None, :]
    step, shift = load_grid(scale, zero, i[:, None] * stride + d[None, :], mask, BITS, ZERO)
    return split_planes(step, N), split_planes(shift, N)


@triton.jit
def key_rows(
    q, TOKEN: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, MP: tl.constexpr, U: tl.constexpr,
    N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What all tiles share: of keys grouped along channels left factors, and sums of q in every group."""
    rows, sums = (), ()
    if not TOKEN:
        rows, sums = _channel_rows(q, SIZE, GROUPS, MP, U, N, DOT)
    return rows, sums


@triton.jit
def tile_scores(
    q, rows, sums, keys, scale, zero, tile, live, stop, T: tl.constexpr, GRID_T: tl.constexpr,
    D: tl.constexpr, TOKEN: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, U: tl.constexpr,
    N: tl.constexpr, UB: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    MP: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Q . k of the tokens from `tile` on, [MP, TILE]; codes are read where `live`, grids before `stop`."""
    r, u = tl.arange(0, TILE), tl.arange(0, U)
    at = tl.full([], 0, tl.int64) + tile
    word = load_units(keys + at * T + (r * T)[None, :], (u * UB)[:, None], live[None, :], D, U, BITS)
    if TOKEN:
        grids = at // SIZE * GRID_T
        s = _scores_by_token(
            q, word, scale + grids, zero + grids, (tile + r) // SIZE - tile // SIZE, GRID_T,
            (stop - 1) // SIZE - tile // SIZE, D, GROUPS, MP, U, N, TILE, BITS, ZERO, DOT,
        )  # fmt: skip
    else:
        s = _scores_by_channel(
            rows, sums, word, scale + at * GRID_T, zero + at * GRID_T, r, GRID_T, live,
            (D + SIZE - 1) // SIZE, GROUPS, MP, N, TILE, BITS, ZERO, DOT,
        )  # fmt: skip
    return s


@triton.jit
def _channel_rows(
    q, SIZE: tl.constexpr, GROUPS: tl.constexpr, MP: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Left factors of all tiles for keys grouped along channels, and sums of q in every group."""
    i, u = tl.arange(0, GROUPS), tl.arange(0, U)
    rows = ()
    sums = tl.zeros([GROUPS, MP, U], tl.float32)
    for j in tl.static_range(N):
        member = ((u * N + j) // SIZE)[None, :] == i[:, None]
        x = tl.where(member[:, None, :], q[j][None, :, :], 0.0)
        sums += x
        rows += (tl.reshape(x, [GROUPS * MP, U]).to(DOT),)
    return rows, tl.sum(sums, 2)


@triton.jit
def _scores_by_channel(
    rows, sums, word, scale, zero, r, stride: tl.constexpr, live, G: tl.constexpr,
    GROUPS: tl.constexpr, MP: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Q . k of a tile, [MP, TILE]: keys grouped along channels, `word` [U, TILE]."""
    i = tl.arange(0, GROUPS)
    raw = tl.zeros([GROUPS * MP, TILE], tl.float32)
    for j in tl.static_range(N):
        raw = tl.dot(rows[j], plane(word, j, BITS, DOT), raw, input_precision="ieee")
    offsets = r[None, :] * stride + i[:, None]
    step, shift = load_grid(scale, zero, offsets, live[None, :] & (i < G)[:, None], BITS, ZERO)
    products = tl.reshape(raw, [GROUPS, MP, TILE]) * step[:, None, :]
    return tl.sum(products + shift[:, None, :] * sums[:, :, None], 0)


@triton.jit
def _scores_by_token(
    q, word, scale, zero, group, stride: tl.constexpr, last, D: tl.constexpr,
    GROUPS: tl.constexpr, MP: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
    TILE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Q . k of a tile, [MP, TILE]: keys grouped along tokens, `word` [U, TILE].

    `group` [TILE] counts the tile's groups from 0 to, at most, `last`; `scale` points to the first.
    """
    i = tl.arange(0, GROUPS)
    steps, shifts = grid_planes(scale, zero, i, stride, last, D, U, N, BITS, ZERO)
    raw = tl.zeros([GROUPS * MP, TILE], tl.float32)
    sums = tl.zeros([GROUPS, MP, U], tl.float32)
    for j in tl.static_range(N):
        x = tl.reshape(q[j][None, :, :] * steps[j][:, None, :], [GROUPS * MP, U]).to(DOT)
        sums += q[j][None, :, :] * shifts[j][:, None, :]
        raw = tl.dot(x, plane(word, j, BITS, DOT), raw, input_precision="ieee")
    member = group[None, :] == i[:, None]
    products = tl.reshape(raw, [GROUPS, MP, TILE]) + tl.sum(sums, 2)[:, :, None]
    return tl.sum(tl.where(member[:, None, :], products, 0.0), 0)


@triton.jit
def masked(
    s, factor, softcap, mask, mask_position, live, SOFTCAP: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """Scores [MP, TILE] in units of log 2, minus infinity where a token is not to be read."""
    s = s * factor[:, None]
    if SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    if MASK:
        s += tl.load(mask + mask_position, mask=live, other=0.0).to(tl.float32)[None, :]
    return tl.where(live[None, :], s * 1.4426950408889634, MINUS_INFINITY)


@triton.jit
def soften(s, running, weight):
    """One step of the online softmax: maximum, total weight, factor on older sums, weights.

    `weight` [MP, TILE] is still to be summed.
    """
    grown = tl.maximum(running, tl.max(s, 1))
    safe = tl.where(grown == MINUS_INFINITY, 0.0, grown)
    alpha = tl.exp2(running - safe)
    p = tl.exp2(s - safe[:, None])
    return grown, weight * alpha[:, None] + p, alpha, p


@triton.jit
def no_sums(
    TOKEN: tl.constexpr, GROUPS: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
    MP: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sums, offsets and peak before the first tile, see `_mix_by_channel` and `_mix_by_token`."""
    ROWS: tl.constexpr = MP if TOKEN else GROUPS * MP
    acc = ()
    for _ in tl.static_range(N):
        acc += (tl.zeros([ROWS, U], tl.float32),)
    peak = tl.full([GROUPS], 1.0 if DOT == tl.float32 else 1e-30, tl.float32)
    return acc, tl.zeros([GROUPS, MP, TILE], tl.float32), peak


@triton.jit
def tile_sums(
    acc, offsets, peak, p, alpha, values, scale, zero, tile, live, stop, T: tl.constexpr,
    GRID_T: tl.constexpr, D: tl.constexpr, TOKEN: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    U: tl.constexpr, N: tl.constexpr, UB: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    MP: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add p . v of the tokens from `tile` on; `live` and `stop` as in `tile_scores`."""
    r, u = tl.arange(0, TILE), tl.arange(0, U)
    at = tl.full([], 0, tl.int64) + tile
    word = load_units(values + at * T + (r * T)[:, None], (u * UB)[None, :], live[:, None], D, U, BITS)
    if TOKEN:
        grids = at // SIZE * GRID_T
        acc = _mix_by_token(
            acc, p, alpha, word, scale + grids, zero + grids, (tile + r) // SIZE - tile // SIZE, GRID_T,
            (stop - 1) // SIZE - tile // SIZE, D, GROUPS, MP, U, N, TILE, BITS, ZERO, DOT,
        )  # fmt: skip
    else:
        acc, offsets, peak = _mix_by_channel(
            acc, offsets, peak, p, alpha, word, scale + at * GRID_T, zero + at * GRID_T, r, GRID_T, live,
            (D + SIZE - 1) // SIZE, GROUPS, MP, N, TILE, BITS, ZERO, DOT,
        )  # fmt: skip
    return acc, offsets, peak


@triton.jit
def _mix_by_channel(
    acc, offsets, peak, p, alpha, word, scale, zero, r, stride: tl.constexpr, live, G: tl.constexpr,
    GROUPS: tl.constexpr, MP: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add a tile to the sums: values grouped along channels, `word` [TILE, U].

    `acc` are N planes [GROUPS*MP, U] in units of `peak` [GROUPS], the greatest step so far; `offsets`
    [GROUPS, MP, TILE] are still to be summed, which is done once, over all tiles.
    """
    i = tl.arange(0, GROUPS)
    where = r[None, :] * stride + i[:, None]
    step, shift = load_grid(scale, zero, where, live[None, :] & (i < G)[:, None], BITS, ZERO)
    grown = peak
    if DOT != tl.float32:
        grown = tl.maximum(peak, tl.max(step, 1))
        step = step / grown[:, None]
    beta = tl.reshape(alpha[None, :] * (peak / grown)[:, None], [GROUPS * MP])
    x = tl.reshape(p[None, :, :] * step[:, None, :], [GROUPS * MP, TILE]).to(DOT)
    sums = ()
    for j in tl.static_range(N):
        sums += (tl.dot(x, plane(word, j, BITS, DOT), acc[j] * beta[:, None], input_precision="ieee"),)
    offsets = offsets * alpha[None, :, None] + p[None, :, :] * shift[:, None, :]
    return sums, offsets, grown


@triton.jit
def _mix_by_token(
    acc, p, alpha, word, scale, zero, group, stride: tl.constexpr, last, D: tl.constexpr,
    GROUPS: tl.constexpr, MP: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
    TILE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add a tile to the sums, N planes [MP, U]: values grouped along tokens, `word` [TILE, U].

    `group` and `last` as in `_scores_by_token`.
    """
    i = tl.arange(0, GROUPS)
    steps, shifts = grid_planes(scale, zero, i, stride, last, D, U, N, BITS, ZERO)
    member = group[None, :] == i[:, None]
    weights = tl.where(member[:, None, :], p[None, :, :], 0.0)
    totals = tl.sum(weights, 2)
    x = tl.reshape(weights, [GROUPS * MP, TILE]).to(DOT)
    sums = ()
    for j in tl.static_range(N):
        raw = tl.reshape(tl.dot(x, plane(word, j, BITS, DOT), input_precision="ieee"), [GROUPS, MP, U])
        add = tl.sum(raw * steps[j][:, None, :] + totals[:, :, None] * shifts[j][:, None, :], 0)
        sums += (acc[j] * alpha[:, None] + add,)
    return sums
