"""Affine codes on CPUs: the twins of `kvpack.ops.packed_affine`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.kernels.cpu import affine_rows, codes, integer_rows, jit, pool
from kvpack.kernels.cpu.tiles import TILE
from kvpack.ops.packed_affine import AffineCodes

_KINDS = {
    torch.float32: jit.FLOAT32,
    torch.float16: jit.FLOAT16,
    torch.bfloat16: jit.BFLOAT16,
    torch.float8_e4m3fn: jit.FLOAT8,
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
    if _in_integers(query, x):
        return _integer_products(query, x)
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


def _chunk(x: AffineCodes) -> int:
    """Channels that are multiplied in integers at a time, a divisor of the group; 0 if there is none."""
    if x.axis != "channel" or x.channels % x.group:
        return 0
    return next((n for n in range(_MOST_CHANNELS, 0, -codes.LANES) if x.group % n == 0), 0)


def _in_integers(query: Tensor, x: AffineCodes) -> bool:
    """Whether rows are long and many enough, as those of weights are, for rounding the vectors to pay."""
    return x.outer == 1 and x.channels >= 2 * _MOST_CHANNELS and x.tokens >= _MANY_ROWS and _chunk(x) > 0


def _integer_products(query: Tensor, x: AffineCodes) -> Tensor:
    """`scores` of one outer index by `integer_rows`."""
    per = 2 if query.dtype in (torch.float32, torch.float64) else 1
    vectors = query.reshape(-1, x.channels).float().contiguous()
    count, chunk = len(vectors), _chunk(x)
    out = torch.empty((*query.shape[:-1], x.tokens))
    per_item = max(16, min(128, x.tokens // (8 * pool.threads())))
    zero = _zero(x)
    pool.run(
        integer_rows.entry(),
        -(-x.tokens // per_item),
        integer_rows.scratch_bytes(x.channels, count, per, chunk, x.group),
        *(x.tokens, x.channels, count, per_item),
        *(x.codes.data_ptr(), x.codes.stride(-2)),
        *(x.scale.data_ptr(), x.scale.stride(-2) * x.scale.element_size()),
        *(zero.data_ptr(), zero.stride(-2) * zero.element_size()),
        *(x.group, chunk, x.bits, _KINDS[x.scale.dtype], _zeros(x)),
        *(codes.field_span(x.bits, chunk) // codes.LANES, vectors.data_ptr(), per, out.data_ptr()),
    )
    return out


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
    items = -(-x.tokens // per_item)
    heads = x.codes.shape[-3] if x.codes.dim() > 2 else 1
    rows, address = (0, 0) if source is None else (source.shape[-2], source.data_ptr())
    axis = affine_rows.TOKEN if x.axis == "token" else affine_rows.CHANNEL
    pool.run(
        affine_rows.entry(),
        x.outer * items,
        affine_rows.scratch_bytes(x.channels),
        *(heads, x.tokens, x.channels, rows, per_item, items),
        *(*_place(x.codes), *_place(x.scale), *_place(_zero(x))),
        *(x.group, address, out.data_ptr()),
        *(mode, axis, x.bits, _KINDS[x.scale.dtype], _zeros(x), _KINDS[out.dtype]),
    )


def _place(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address and strides in bytes of the axes b, k and row."""
    size, strides = tensor.element_size(), tensor.stride()
    b = strides[-4] if len(strides) > 3 else 0
    k = strides[-3] if len(strides) > 2 else 0
    return tensor.data_ptr(), b * size, k * size, strides[-2] * size
