"""Affine codes on CPUs: the twins of `kvpack.ops.packed_affine`."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from kvpack.kernels.cpu import frames, integer_products, pool
from kvpack.kernels.cpu.entries import entry
from kvpack.kernels.cpu.tensors import KINDS, place, zeros
from kvpack.ops.packed_affine import AffineCodes

_MOST_TOKENS = 512
"""Tokens that a thread takes at a time; short enough for threads to end together."""


def fits(x: AffineCodes) -> bool:
    """Whether the kernels can read these codes: rows in one piece, at most two outer axes."""
    held = [t for t in (x.codes, x.scale, x.zero) if t is not None]
    return x.scale.dtype in KINDS and x.codes.dim() <= 4 and all(t.stride(-1) == 1 for t in held)


def scores(query: Tensor, x: AffineCodes) -> Tensor:
    """See `kvpack.ops.packed_affine.scores`."""
    if integer_products.fits(x):
        return integer_products.scores(query, x)
    whole = x.channels // x.group * x.group
    head = _columns(x, 0, whole)
    if whole < x.channels and integer_products.fits(head):
        found = integer_products.scores(query[..., :whole], head)
        return found + scores(query[..., whole:], _columns(x, whole, x.channels))
    query = query.float().contiguous()
    out = query.new_empty((*query.shape[:-1], x.tokens))
    _run(frames.SCORES, x, _tokens_per_item(x), query, out)
    return out


def multiplier(x: AffineCodes) -> Callable[[Tensor], Tensor]:
    """`scores` in the dtype of the query, for codes that are multiplied again and again."""
    if integer_products.fits(x):
        return integer_products.multiplier(x)
    return lambda query: scores(query, x).to(query.dtype)


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


def attention(
    query: Tensor, keys: AffineCodes, values: AffineCodes, start: int, tokens: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kvpack.kernels.affine.attention`; without a bound on scores."""
    query, (keys, values) = query.float().contiguous(), (_with_rows_together(x) for x in (keys, values))
    heads, per_item = query.shape[:-1], max(frames.TILE, tokens)
    if keys.outer < 2 * pool.threads():
        per_item = max(frames.TILE, -(-tokens // (2 * pool.threads())) // frames.TILE * frames.TILE)
    parts = -(-tokens // per_item)
    found = torch.empty((parts, *heads, keys.channels))
    maxima, sums = torch.empty((parts, *heads)), torch.empty((parts, *heads))
    rest = query.shape[-2], per_item, parts, query.data_ptr(), found.data_ptr()
    value_frame = array("q", (0,) * 5 + _frame(frames.MIX, values, tokens, *rest))
    pool.run(
        entry("affine_attention"),
        keys.outer * parts,
        frames.attention_scratch(keys.channels, query.shape[-2]),
        *_frame(frames.SCORES, keys, tokens, *rest),
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


def _columns(x: AffineCodes, start: int, stop: int) -> AffineCodes:
    """The channels from `start`, where a group begins, to `stop`, as views; all where groups are tokens."""
    if x.axis != "channel" or stop - start == x.channels:
        return x
    groups = slice(start // x.group, -(-stop // x.group))
    zero = None if x.zero is None else x.zero[..., groups]
    codes = x.codes[..., start * x.bits // 8 : -(-stop * x.bits // 8)]
    return x._replace(codes=codes, scale=x.scale[..., groups], zero=zero, channels=stop - start, size=x.group)


def _tokens_per_item(x: AffineCodes) -> int:
    """Few enough tokens for every thread to get several items."""
    share = x.tokens * x.outer // (4 * pool.threads())
    return max(frames.TILE, min(_MOST_TOKENS, share) // frames.TILE * frames.TILE)


def _run(mode: int, x: AffineCodes, per_item: int, source: Tensor | None, out: Tensor) -> None:
    if not out.numel() or not x.tokens:
        out.zero_()
        return
    x = _with_rows_together(x)
    items = -(-x.tokens // per_item)
    rows, address = (0, 0) if source is None else (source.shape[-2], source.data_ptr())
    frame = _frame(mode, x, x.tokens, rows, per_item, items, address, out.data_ptr())
    scratch = frames.affine_scratch(x.channels)
    pool.run(entry("affine_rows"), x.outer * items, scratch, *frame, KINDS[out.dtype])


def _frame(
    mode: int, x: AffineCodes, tokens: int, rows: int, per_item: int, items: int, source: int, out: int
) -> tuple[int, ...]:
    """Numbers 5 to 30 of a frame of `affine_rows`."""
    heads = x.codes.shape[-3] if x.codes.dim() > 2 else 1
    axis = frames.TOKEN if x.axis == "token" else frames.CHANNEL
    return (
        *(heads, tokens, x.channels, rows, per_item, items),
        *(*place(x.codes), *place(x.scale), *place(x.scale if x.zero is None else x.zero)),
        *(x.group, source, out, mode, axis, x.bits, KINDS[x.scale.dtype], zeros(x.zero)),
    )


def _with_rows_together(x: AffineCodes) -> AffineCodes:
    """Codes whose grid can be read several rows at once."""
    if x.axis == "token":
        return x
    return x._replace(scale=_rows_together(x.scale), zero=None if x.zero is None else _rows_together(x.zero))


def _rows_together(tensor: Tensor) -> Tensor:
    """A tensor whose rows lie one after another: itself, or a copy."""
    return tensor if tensor.stride(-2) == tensor.shape[-1] else tensor.contiguous()
