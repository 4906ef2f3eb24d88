"""Affine codes on CPUs: the twins of `kvpack.ops.packed_affine`."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvpack.kernels.cpu import (
    affine_attention,
    affine_rows,
    codes,
    integer_grids,
    integer_rows,
    integer_vectors,
    jit,
    pool,
)
from kvpack.kernels.cpu.tiles import TILE
from kvpack.ops.packed_affine import AffineCodes

_KINDS = {
    torch.float32: jit.FLOAT32,
    torch.float16: jit.FLOAT16,
    torch.bfloat16: jit.BFLOAT16,
    torch.float8_e4m3fn: jit.FLOAT8,
}
_MANY_ROWS = 64
_MOST_TOKENS = 512
"""Tokens that a thread takes at a time; short enough for threads to end together."""


def fits(x: AffineCodes) -> bool:
    """Whether the kernels can read these codes: rows in one piece, at most two outer axes."""
    held = [t for t in (x.codes, x.scale, x.zero) if t is not None]
    return x.scale.dtype in _KINDS and x.codes.dim() <= 4 and all(t.stride(-1) == 1 for t in held)


def scores(query: Tensor, x: AffineCodes) -> Tensor:
    """See `kvpack.ops.packed_affine.scores`."""
    rows = _integer_rows(x)
    if rows is not None:
        return _integer_products(x, rows)(_stored(query), torch.float32)
    whole = x.channels // x.group * x.group
    head = _columns(x, 0, whole)
    if whole < x.channels and (rows := _integer_rows(head)) is not None:
        found = _integer_products(head, rows)(_stored(query[..., :whole]), torch.float32)
        return found + scores(query[..., whole:], _columns(x, whole, x.channels))
    query = query.float().contiguous()
    out = query.new_empty((*query.shape[:-1], x.tokens))
    _run(affine_rows.SCORES, x, _tokens_per_item(x), query, out)
    return out


def mix(weights: Tensor, x: AffineCodes) -> Tensor:
    """See `kvpack.ops.packed_affine.mix`."""
    weights = weights.float().contiguous()
    # With few heads the tokens are divided, and every thread sums up its own.
    per_item = _tokens_per_item(x) if x.outer < pool.threads() else max(1, x.tokens)
    parts = weights.new_empty((-(-x.tokens // per_item), *weights.shape[:-1], x.channels))
    _run(affine_rows.MIX, x, per_item, weights, parts)
    return parts[0] if len(parts) == 1 else parts.sum(0)


def dense(x: AffineCodes, dtype: torch.dtype) -> Tensor:
    """See `kvpack.ops.packed_affine.dense`."""
    out = torch.empty((*x.codes.shape[:-1], x.channels), dtype=dtype)
    _run(affine_rows.DENSE, x, _tokens_per_item(x), None, out)
    return out


def _columns(x: AffineCodes, start: int, stop: int) -> AffineCodes:
    """The channels from `start`, where a group begins, to `stop`, as views; all where groups are tokens."""
    if x.axis != "channel" or stop - start == x.channels:
        return x
    groups = slice(start // x.group, -(-stop // x.group))
    zero = None if x.zero is None else x.zero[..., groups]
    codes = x.codes[..., start * x.bits // 8 : -(-stop * x.bits // 8)]
    return x._replace(codes=codes, scale=x.scale[..., groups], zero=zero, channels=stop - start, size=x.group)


def _stored(query: Tensor) -> Tensor:
    """A query as kernels can read it."""
    return query if query.dtype in (torch.float32, torch.float16, torch.bfloat16) else query.float()


class _Rows(NamedTuple):
    """How the rows of a weight are multiplied in integers, whatever the vectors are."""

    chunk: int
    fields: int
    per_item: int
    scales: int
    zeros: int
    chunks: int
    groups: int
    padded: int
    frame: tuple[int, ...]
    """What follows the output in the frame of `integer_rows`."""


@functools.lru_cache(maxsize=256)
def _rows(
    bits: int,
    group: int,
    channels: int,
    rows: int,
    scale: torch.dtype,
    zero: torch.dtype | None,
    threads: int,
) -> _Rows | None:
    """None where rows are too short or too few for rounding the vectors to pay, or groups do not fit."""
    if channels < 2 * integer_rows.MOST_CHANNELS or rows < _MANY_ROWS or channels % group:
        return None
    chunk = next((n for n in range(integer_rows.MOST_CHANNELS, 0, -codes.LANES) if group % n == 0), 0)
    if not chunk:
        return None
    kinds, (zeros, zero_kind, zero_size) = _KINDS[scale], _stored_zeros(scale, zero)
    fields, per_item = codes.field_span(bits, chunk) // codes.LANES, max(16, min(128, rows // (8 * threads)))
    chunks, groups, each = channels // chunk, channels // group, group // chunk
    padded = -(-groups // integer_grids.GROUPS) * integer_grids.GROUPS
    key, sizes = integer_vectors.key(bits, fields, chunk), (groups * scale.itemsize, groups * zero_size)
    frame = (key, chunks, groups, padded, each, *sizes, zero_kind)
    return _Rows(chunk, fields, per_item, kinds, zeros, chunks, groups, padded, frame)


def _stored_zeros(scale: torch.dtype, zero: torch.dtype | None) -> tuple[int, int, int]:
    """How zeros are meant, how they are stored if they are no integers, and their bytes."""
    if zero is None:
        return affine_rows.CENTRED, _KINDS[scale], 0
    if not zero.is_floating_point:
        return affine_rows.CENTRED_INTEGER, jit.INT8, zero.itemsize
    return affine_rows.OFFSET, _KINDS[zero], zero.itemsize


def _integer_rows(x: AffineCodes) -> _Rows | None:
    if x.axis != "channel" or x.outer != 1:
        return None
    zero = None if x.zero is None else x.zero.dtype
    return _rows(x.bits, x.group, x.channels, x.tokens, x.scale.dtype, zero, pool.threads())


def multiplier(x: AffineCodes) -> Callable[[Tensor], Tensor]:
    """`scores` in the dtype of the query, for codes that are multiplied again and again."""
    rows = _integer_rows(x)
    if rows is None:
        return lambda query: scores(query, x).to(query.dtype)
    products = _integer_products(x, rows)
    return lambda query: products(query, query.dtype)


def _integer_products(x: AffineCodes, rows: _Rows) -> Callable[[Tensor, torch.dtype], Tensor]:
    """`scores` of one outer index by `integer_rows`, for queries and products of any dtype."""
    tokens, zero, entry = x.tokens, _zero(x), integer_rows.entry()
    items = -(-tokens // rows.per_item)
    fixed = (
        *(rows.per_item, x.codes.data_ptr(), x.codes.stride(-2)),
        *(x.scale.data_ptr(), x.scale.stride(-2) * x.scale.element_size()),
        *(zero.data_ptr(), zero.stride(-2) * zero.element_size()),
        *(x.group, rows.chunk, x.bits, rows.scales, rows.zeros, rows.fields),
    )

    def products(query: Tensor, dtype: torch.dtype) -> Tensor:
        per = 2 if query.dtype == torch.float32 else 1
        vectors, channels = query.contiguous(), x.channels  # x: the frame has addresses of its tensors
        count = vectors.numel() // channels
        out = torch.empty((*query.shape[:-1], tokens), dtype=dtype)
        scratch = integer_rows.scratch_bytes(channels, count * per, rows.chunks, rows.padded)
        given = (vectors.data_ptr(), per, out.data_ptr(), *rows.frame, _KINDS[query.dtype], _KINDS[dtype])
        pool.run(entry, items, scratch, tokens, channels, count, *fixed, *given)
        return out

    return products


def _zero(x: AffineCodes) -> Tensor:
    return x.scale if x.zero is None else x.zero


def _zeros(x: AffineCodes) -> int:
    if x.zero is None:
        return affine_rows.CENTRED
    return affine_rows.OFFSET if x.zero.dtype.is_floating_point else affine_rows.CENTRED_INTEGER


def _tokens_per_item(x: AffineCodes) -> int:
    """Few enough tokens for every thread to get several items."""
    share = x.tokens * x.outer // (4 * pool.threads())
    return max(TILE, min(_MOST_TOKENS, share) // TILE * TILE)


def _run(mode: int, x: AffineCodes, per_item: int, source: Tensor | None, out: Tensor) -> None:
    if not out.numel() or not x.tokens:
        out.zero_()
        return
    x = _with_rows_together(x)
    items = -(-x.tokens // per_item)
    rows, address = (0, 0) if source is None else (source.shape[-2], source.data_ptr())
    frame = _frame(mode, x, x.tokens, rows, per_item, items, address, out.data_ptr())
    scratch = affine_rows.scratch_bytes(x.channels)
    pool.run(affine_rows.entry(), x.outer * items, scratch, *frame, _KINDS[out.dtype])


def _frame(
    mode: int, x: AffineCodes, tokens: int, rows: int, per_item: int, items: int, source: int, out: int
) -> tuple[int, ...]:
    """Numbers 5 to 30 of a frame of `affine_rows`."""
    heads = x.codes.shape[-3] if x.codes.dim() > 2 else 1
    axis = affine_rows.TOKEN if x.axis == "token" else affine_rows.CHANNEL
    return (
        *(heads, tokens, x.channels, rows, per_item, items),
        *(*_place(x.codes), *_place(x.scale), *_place(_zero(x))),
        *(x.group, source, out, mode, axis, x.bits, _KINDS[x.scale.dtype], _zeros(x)),
    )


def attention(
    query: Tensor, keys: AffineCodes, values: AffineCodes, start: int, tokens: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kvpack.kernels.affine.attention`; without a bound on scores."""
    query, (keys, values) = query.float().contiguous(), (_with_rows_together(x) for x in (keys, values))
    heads, per_item = query.shape[:-1], max(TILE, tokens)
    if keys.outer < 2 * pool.threads():
        per_item = max(TILE, -(-tokens // (2 * pool.threads())) // TILE * TILE)
    parts = -(-tokens // per_item)
    found = torch.empty((parts, *heads, keys.channels))
    maxima, sums = torch.empty((parts, *heads)), torch.empty((parts, *heads))
    rest = query.shape[-2], per_item, parts, query.data_ptr(), found.data_ptr()
    value_frame = array("q", (0,) * 5 + _frame(affine_rows.MIX, values, tokens, *rest))
    pool.run(
        affine_attention.entry(),
        keys.outer * parts,
        affine_attention.scratch_bytes(keys.channels, query.shape[-2]),
        *_frame(affine_rows.SCORES, keys, tokens, *rest),
        *(value_frame.buffer_info()[0], start, maxima.data_ptr(), sums.data_ptr()),
        0 if mask is None else mask.data_ptr(),
    )
    return _joined(found, maxima, sums)


def _joined(values: Tensor, maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stretches [part, ...] of the same heads as one."""
    if len(values) == 1:
        return values[0], maxima[0], sums[0]
    highest = maxima.amax(0)
    share = torch.exp(maxima - highest.masked_fill(highest == -torch.inf, 0.0))
    return (values * share.unsqueeze(-1)).sum(0), highest, (sums * share).sum(0)


def _with_rows_together(x: AffineCodes) -> AffineCodes:
    """Codes whose grid can be read several rows at once."""
    if x.axis == "token":
        return x
    return x._replace(scale=_rows_together(x.scale), zero=None if x.zero is None else _rows_together(x.zero))


def _rows_together(tensor: Tensor) -> Tensor:
    """A tensor whose rows lie one after another: itself, or a copy."""
    return tensor if tensor.stride(-2) == tensor.shape[-1] else tensor.contiguous()


def _place(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address and strides in bytes of the axes b, k and row."""
    size, strides = tensor.element_size(), tensor.stride()
    b = strides[-4] if len(strides) > 3 else 0
    k = strides[-3] if len(strides) > 2 else 0
    return tensor.data_ptr(), b * size, k * size, strides[-2] * size
