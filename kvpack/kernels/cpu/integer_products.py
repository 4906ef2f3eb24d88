"""Products of vectors with affine codes in integers, on CPUs: what surrounds `integer_rows`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvpack.kernels.cpu import frames, pool
from kvpack.kernels.cpu.entries import entry
from kvpack.kernels.cpu.tensors import KINDS
from kvpack.ops.packed_affine import AffineCodes

_MANY_ROWS = 64


def fits(x: AffineCodes) -> bool:
    """Whether rows are long and many enough for rounding the vectors to pay, and groups fit."""
    return _rows_of(x) is not None


def scores(query: Tensor, x: AffineCodes) -> Tensor:
    """`kvpack.ops.packed_affine.scores` of codes that fit."""
    return _products(x)(_stored(query), torch.float32)


def multiplier(x: AffineCodes) -> Callable[[Tensor], Tensor]:
    """`scores` in the dtype of the query, for codes that fit and are multiplied again and again."""
    products = _products(x)
    return lambda query: products(query, query.dtype)


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
    if channels < 2 * frames.MOST_CHANNELS or rows < _MANY_ROWS or channels % group:
        return None
    chunk = next((n for n in range(frames.MOST_CHANNELS, 0, -frames.LANES) if group % n == 0), 0)
    if not chunk:
        return None
    kinds, (zeros, zero_kind, zero_size) = KINDS[scale], _stored_zeros(scale, zero)
    fields, per_item = (
        frames.field_span(bits, chunk) // frames.LANES,
        max(16, min(128, rows // (8 * threads))),
    )
    chunks, groups, each = channels // chunk, channels // group, group // chunk
    padded = -(-groups // frames.GROUPS) * frames.GROUPS
    key, sizes = frames.integer_key(bits, fields, chunk), (groups * scale.itemsize, groups * zero_size)
    frame = (key, chunks, groups, padded, each, *sizes, zero_kind)
    return _Rows(chunk, fields, per_item, kinds, zeros, chunks, groups, padded, frame)


def _stored_zeros(scale: torch.dtype, zero: torch.dtype | None) -> tuple[int, int, int]:
    """How zeros are meant, how they are stored if they are no integers, and their bytes."""
    if zero is None:
        return frames.CENTRED, KINDS[scale], 0
    if not zero.is_floating_point:
        return frames.CENTRED_INTEGER, frames.INT8, zero.itemsize
    return frames.OFFSET, KINDS[zero], zero.itemsize


def _rows_of(x: AffineCodes) -> _Rows | None:
    if x.axis != "channel" or x.outer != 1:
        return None
    zero = None if x.zero is None else x.zero.dtype
    return _rows(x.bits, x.group, x.channels, x.tokens, x.scale.dtype, zero, pool.threads())


def _products(x: AffineCodes) -> Callable[[Tensor, torch.dtype], Tensor]:
    """`scores` of one outer index by `integer_rows`, for queries and products of any dtype."""
    rows = _rows_of(x)
    if rows is None:
        raise ValueError("these codes are not multiplied in integers")
    tokens, loop = x.tokens, entry("integer_rows")
    zero = x.scale if x.zero is None else x.zero
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
        scratch = frames.integer_scratch(channels, count * per, rows.chunks, rows.padded)
        given = (vectors.data_ptr(), per, out.data_ptr(), *rows.frame, KINDS[query.dtype], KINDS[dtype])
        pool.run(loop, items, scratch, tokens, channels, count, *fixed, *given)
        return out

    return products
