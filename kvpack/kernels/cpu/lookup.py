"""Codes that are looked up, on CPUs: the twins of `kvpack.ops.packed_lookup`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from kvpack.core.types import CodedRows
from kvpack.kernels.cpu import affine_rows, lookup_rows, lookups, pool
from kvpack.kernels.cpu.entries import entry
from kvpack.kernels.cpu.tensors import KINDS, zeros
from kvpack.ops import masks

_CODES = {"even": lookup_rows.EVEN, "mirrored": lookup_rows.MIRRORED, "vectors": lookup_rows.VECTORS}
_TOGETHER = 4
"""Rows that are summed together, and what the rows of an item are a multiple of."""
_MOST_ROWS = 128
"""Rows that a thread takes at a time."""
_FEW = 8
"""Queries up to which vectors of a codebook are looked up anew for each of them."""
_STEP = 32
"""Channels that 2:4 products take at a time."""


def fits(x: CodedRows) -> bool:
    """Whether the kernels can read these codes: rows in one piece, one regular outer axis."""
    held = [t for t in (x.codes, x.first, x.second, x.mask) if t is not None]
    flat = x.codes.dim() == 2 or all(t.is_contiguous() for t in held)
    return flat and x.first.dtype in KINDS and all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in held)


def scores(query: Tensor, x: CodedRows) -> Tensor:
    """Products of queries [..., M, D] with the numbers [..., T, D]: float32 [..., M, T]."""
    rows = _flat(query, x).float()
    source = functional.pad(rows, (0, -x.channels % _STEP)) if _in_fours(x) else rows
    out = rows.new_empty((*rows.shape[:-1], x.codes.shape[-2]))
    direct = _in_fours(x) or (x.mask is None and rows.shape[-2] <= _FEW and _vector(x) in lookups.SIZES)
    mode = lookup_rows.PRODUCTS if direct else affine_rows.SCORES
    _run(mode, x, _share(x), source.contiguous(), out)
    return out.reshape(*query.shape[:-1], x.codes.shape[-2])


def mix(weights: Tensor, x: CodedRows) -> Tensor:
    """Sums of the numbers [..., T, D] with weights [..., M, T]: float32 [..., M, D]."""
    rows = _flat(weights, x).float().contiguous()
    # With few heads the rows are divided, and every thread sums up its own.
    share = _share(x) if len(rows) < pool.threads() else max(1, x.codes.shape[-2])
    parts = rows.new_empty((-(-x.codes.shape[-2] // share), *rows.shape[:-1], x.channels))
    _run(affine_rows.MIX, x, share, rows, parts)
    return parts.sum(0).reshape(*weights.shape[:-1], x.channels)


def dense(x: CodedRows, dtype: torch.dtype) -> Tensor:
    """The decoded numbers [..., T, D] in `dtype`."""
    out = torch.empty((*x.codes.shape[:-1], x.channels), dtype=dtype)
    _run(affine_rows.DENSE, x, _share(x), None, out)
    return out


def _flat(source: Tensor, x: CodedRows) -> Tensor:
    """Queries or weights [outer, M, n]."""
    outer = x.codes.shape[:-2].numel()
    return source.reshape(outer, source.shape[:-1].numel() // max(1, outer), source.shape[-1])


def _vector(x: CodedRows) -> int:
    """Numbers that a code stands for."""
    return x.second.shape[-1] if x.kind == "vectors" and x.second is not None else 1


def _in_fours(x: CodedRows) -> bool:
    return x.mask is not None and (x.keep, x.of) == (2, 4) and x.kind != "vectors"


def _share(x: CodedRows) -> int:
    """Few enough rows for every thread to get several items."""
    rows = x.codes.shape[:-1].numel() // (4 * pool.threads())
    return max(_TOGETHER, min(_MOST_ROWS, rows) // _TOGETHER * _TOGETHER)


def _run(mode: int, x: CodedRows, share: int, source: Tensor | None, out: Tensor) -> None:
    outer, tokens = x.codes.shape[:-2].numel(), x.codes.shape[-2]
    if not out.numel() or not tokens:
        out.zero_()
        return
    items, together = -(-tokens // share), _TOGETHER if mode == affine_rows.MIX else 1
    second = x.first if x.second is None else x.second
    pairs = _pairs() if _in_fours(x) else None
    places = _places(x.keep, x.of)
    rows, wide, given = (0, 0, 0) if source is None else (*source.shape[-2:], source.data_ptr())
    pool.run(
        entry("lookup_rows"),
        outer * items,
        lookup_rows.scratch_bytes(together, x.channels, x.width),
        *(tokens, x.channels, rows, share, items, together),
        *(*_place(x.codes), *_place(x.first), *_place(second)),
        *((0, 0, 0) if x.mask is None else _place(x.mask)),
        *(given, wide, out.data_ptr(), mode, _CODES[x.kind], x.bits),
        *(KINDS[x.first.dtype], zeros(x.second), KINDS[out.dtype], x.group, x.width, _vector(x)),
        *(x.keep, x.of, masks.index_bits(x.keep, x.of), places.data_ptr(), len(places)),
        0 if pairs is None else pairs.data_ptr(),
    )


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Address and strides in bytes of the outer index and the row."""
    size, row = tensor.element_size(), tensor.stride(-2)
    return tensor.data_ptr(), tensor.shape[-2] * row * size, row * size


@functools.cache
def _places(keep: int, of: int) -> Tensor:
    """The places that every pattern keeps, int16 [P, keep]."""
    return masks.patterns(keep, of).nonzero()[:, 1].reshape(-1, keep).to(torch.int16).contiguous()


@functools.cache
def _pairs() -> Tensor:
    """Of two 2:4 patterns in six bits, the places within eight channels: int32 [64, 8], four in use."""
    places = _places(2, 4)
    word = torch.arange(64)
    own = [places[(word >> shift & 7).clamp(max=len(places) - 1)] for shift in (0, 3)]
    found = torch.zeros((64, 8), dtype=torch.int32)
    found[:, :4] = torch.cat((own[0], own[1] + 4), 1)
    return found
