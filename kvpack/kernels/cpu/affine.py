"""Affine codes on CPUs: the twins of `kvpack.ops.packed_affine`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kvpack.kernels.cpu import frames, pool
from kvpack.kernels.cpu.entries import entry
from kvpack.ops.packed_affine import AffineCodes

_KINDS = {
    torch.float32: frames.FLOAT32,
    torch.float16: frames.FLOAT16,
    torch.bfloat16: frames.BFLOAT16,
    torch.float8_e4m3fn: frames.FLOAT8,
}
_MOST_CHANNELS = 128
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
        return _integer_products(query, x, rows)
    whole = x.channels // x.group * x.group
    head = _columns(x, 0, whole)
    if whole < x.channels and (rows := _integer_rows(head)) is not None:
        found = _integer_products(query[..., :whole], head, rows)
        return found + scores(query[..., whole:], _columns(x, whole, x.channels))
    query = query.float().contiguous()
    out = query.new_empty((*query.shape[:-1], x.tokens))
    _run(frames.SCORES, x, _tokens_per_item(x), query, out)
    return out


def mix(weights: Tensor, x: AffineCodes) -> Tensor:
    """See `kvpack.ops.packed_affine.mix`."""
    weights = weights.float().contiguous()
    # With few heads the tokens are divided, and every thread sums up its own.
    per_item = _tokens_per_item(x) if x.outer < pool.threads() else max(1, x.tokens)
    parts = weights.new_empty((-(-x.tokens // per_item), *weights.shape[:-1], x.channels))
    _run(frames.MIX, x, per_item, weights, parts)
    return parts[0] if len(parts) == 1 else parts.sum(0)


def dense(x: AffineCodes, dtype: torch.dtype) -> Tensor:
    """See `kvpack.ops.packed_affine.dense`."""
    out = torch.empty((*x.codes.shape[:-1], x.channels), dtype=dtype)
    _run(frames.DENSE, x, _tokens_per_item(x), None, out)
    return out


def _columns(x: AffineCodes, start: int, stop: int) -> AffineCodes:
    """The channels from `start`, where a group begins, to `stop`, as views; all where groups are tokens."""
    if x.axis != "channel" or stop - start == x.channels:
        return x
    groups = slice(start // x.group, -(-stop // x.group))
    zero = None if x.zero is None else x.zero[..., groups]
    codes = x.codes[..., start * x.bits // 8 : -(-stop * x.bits // 8)]
    return x._replace(codes=codes, scale=x.scale[..., groups], zero=zero, channels=stop - start, size=x.group)


class _Rows(NamedTuple):
    """How the rows of a weight are multiplied in integers, whatever the vectors are."""

    chunk: int
    fields: int
    per_item: int
    scales: int
    zeros: int


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
    if channels < 2 * _MOST_CHANNELS or rows < _MANY_ROWS or channels % group:
        return None
    chunk = next((n for n in range(_MOST_CHANNELS, 0, -frames.LANES) if group % n == 0), 0)
    if not chunk:
        return None
    zeros = frames.CENTRED
    if zero is not None:
        zeros = frames.OFFSET if zero.is_floating_point else frames.CENTRED_INTEGER
    fields, per_item = (
        frames.field_span(bits, chunk) // frames.LANES,
        max(16, min(128, rows // (8 * threads))),
    )
    return _Rows(chunk, fields, per_item, _KINDS[scale], zeros)


def _integer_rows(x: AffineCodes) -> _Rows | None:
    if x.axis != "channel" or x.outer != 1:
        return None
    zero = None if x.zero is None else x.zero.dtype
    return _rows(x.bits, x.group, x.channels, x.tokens, x.scale.dtype, zero, pool.threads())


def _integer_products(query: Tensor, x: AffineCodes, rows: _Rows) -> Tensor:
    """`scores` of one outer index by `integer_rows`."""
    per = 2 if query.dtype == torch.float32 else 1
    vectors = query.reshape(-1, x.channels).float().contiguous()
    count, channels, group, tokens = vectors.shape[0], x.channels, x.group, x.tokens
    out = torch.empty((*query.shape[:-1], tokens))
    zero = x.scale if x.zero is None else x.zero
    pool.run(
        entry("integer_rows"),
        -(-tokens // rows.per_item),
        frames.integer_scratch(channels, count, per, rows.chunk, group),
        *(tokens, channels, count, rows.per_item, x.codes.data_ptr(), x.codes.stride(-2)),
        *(x.scale.data_ptr(), x.scale.stride(-2) * x.scale.element_size()),
        *(zero.data_ptr(), zero.stride(-2) * zero.element_size()),
        *(group, rows.chunk, x.bits, rows.scales, rows.zeros, rows.fields),
        *(vectors.data_ptr(), per, out.data_ptr()),
    )
    return out


def _zero(x: AffineCodes) -> Tensor:
    return x.scale if x.zero is None else x.zero


def _zeros(x: AffineCodes) -> int:
    if x.zero is None:
        return frames.CENTRED
    return frames.OFFSET if x.zero.dtype.is_floating_point else frames.CENTRED_INTEGER


def _tokens_per_item(x: AffineCodes) -> int:
    """Few enough tokens for every thread to get several items."""
    share = x.tokens * x.outer // (4 * pool.threads())
    return max(frames.TILE, min(_MOST_TOKENS, share) // frames.TILE * frames.TILE)


def _run(mode: int, x: AffineCodes, per_item: int, source: Tensor | None, out: Tensor) -> None:
    if not out.numel() or not x.tokens:
        out.zero_()
        return
    if x.axis == "channel":  # grids of several rows are read at once
        x = x._replace(scale=_rows_together(x.scale), zero=None if x.zero is None else _rows_together(x.zero))
    items = -(-x.tokens // per_item)
    heads = x.codes.shape[-3] if x.codes.dim() > 2 else 1
    rows, address = (0, 0) if source is None else (source.shape[-2], source.data_ptr())
    axis = frames.TOKEN if x.axis == "token" else frames.CHANNEL
    pool.run(
        entry("affine_rows"),
        x.outer * items,
        frames.affine_scratch(x.channels),
        *(heads, x.tokens, x.channels, rows, per_item, items),
        *(*_place(x.codes), *_place(x.scale), *_place(_zero(x))),
        *(x.group, address, out.data_ptr()),
        *(mode, axis, x.bits, _KINDS[x.scale.dtype], _zeros(x), _KINDS[out.dtype]),
    )


def _rows_together(tensor: Tensor) -> Tensor:
    """A tensor whose rows lie one after another: itself, or a copy."""
    return tensor if tensor.stride(-2) == tensor.shape[-1] else tensor.contiguous()


def _place(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address and strides in bytes of the axes b, k and row."""
    size, strides = tensor.element_size(), tensor.stride()
    b = strides[-4] if len(strides) > 3 else 0
    k = strides[-3] if len(strides) > 2 else 0
    return tensor.data_ptr(), b * size, k * size, strides[-2] * size
