"""Encoded tokens on CPUs: the twins of `kvpack.kernels.rows`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpack.core.rows import LevelCodes, Place, Spread, Step, TokenRows, Turn
from kvpack.kernels.cpu import affine, pool, stored_floats, tensors, token_rows
from kvpack.kernels.cpu.affine_rows import CHANNEL, MIX, SCORES, TOKEN
from kvpack.kernels.cpu.codes import LANES
from kvpack.kernels.cpu.entries import entry
from kvpack.ops.packed_affine import AffineCodes

_KINDS = {**tensors.KINDS, torch.float8_e5m2: stored_floats.FLOAT8_WIDE}
_TILE_NUMBERS = 8192
_MOST_TOKENS = 512
_NOWHERE = (0, 0, 0, 0)


def fits(x: TokenRows) -> bool:
    """Whether the kernels know this source and these steps, in this order, for this number of channels."""
    channels = _channels(x)
    kinds = [type(step) for step in x.steps]
    in_order = kinds == [kind for kind in (Place, Spread, Turn) if kind in kinds]
    return (
        in_order
        and _codes(x).dim() == 4
        and channels % x.heads == 0
        and channels // x.heads % LANES == 0
        and all(_step_fits(step) for step in x.steps)
        and _source_fits(x.source)
        and (x.outliers is None or _in_rows(*x.outliers))
    )


def scores(query: Tensor, x: TokenRows) -> Tensor:
    """See `kvpack.kernels.rows.scores`."""
    query = query.float().contiguous()
    out = query.new_empty((*query.shape[:-1], _codes(x).shape[-2]))
    _run(SCORES, x, query, out, _tokens_per_item(x))
    return out


def mix(weights: Tensor, x: TokenRows) -> Tensor:
    """See `kvpack.kernels.rows.mix`."""
    weights = weights.float().contiguous()
    tokens = max(1, _codes(x).shape[-2])
    # With few heads the tokens are divided, and every thread sums up its own.
    per_item = _tokens_per_item(x) if _codes(x).shape[:-2].numel() < pool.threads() else tokens
    parts = weights.new_empty((-(-tokens // per_item), *weights.shape[:-1], _channels(x) // x.heads))
    _run(MIX, x, weights, parts, per_item)
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _step_fits(step: Step) -> bool:
    if isinstance(step, Spread):
        return step.length >= LANES and step.length & (step.length - 1) == 0
    if isinstance(step, Turn):
        return step.own.is_contiguous() and step.other.is_contiguous() and len(step.partner) % LANES == 0
    return step.order.is_contiguous()


def _source_fits(source: Any) -> bool:
    if isinstance(source, AffineCodes):
        return affine.fits(source)
    if isinstance(source, LevelCodes):
        return _in_rows(source.codes, *_ranges(source)) and source.scale.dtype == torch.float16
    return _in_rows(source) and source.dtype in _KINDS


def _in_rows(*tensors: Tensor) -> bool:
    return all(t.dim() == 4 and t.stride(-1) == 1 and t.device.type == "cpu" for t in tensors)


def _codes(x: TokenRows) -> Tensor:
    codes: Tensor = x.source if isinstance(x.source, Tensor) else x.source.codes
    return codes


def _channels(x: TokenRows) -> int:
    return x.source.shape[-1] if isinstance(x.source, Tensor) else int(x.source.channels)


def _tokens_per_item(x: TokenRows) -> int:
    """Few enough tokens for every thread to get several items."""
    codes = _codes(x)
    share = codes.shape[:-1].numel() // (4 * pool.threads())
    return max(32, min(_MOST_TOKENS, share) // 32 * 32)


def _run(mode: int, x: TokenRows, given: Tensor, out: Tensor, per_item: int) -> None:
    codes, channels = _codes(x), _channels(x)
    batch, outer, tokens, _ = codes.shape
    if not out.numel() or not tokens:
        out.zero_()
        return
    items, together = -(-tokens // per_item), max(1, _TILE_NUMBERS // channels)
    held: list[Tensor] = []
    pool.run(
        entry("token_rows"),
        batch * outer * items,
        token_rows.scratch_bytes(together, channels),
        *(outer, tokens, channels, given.shape[-2], per_item, items),
        *_source(x.source, mode, given, out),
        *(together, x.heads, _levels(x.source)),
        *_outliers(x),
        *_steps(x, held),
    )


def _source(source: Any, mode: int, given: Tensor, out: Tensor) -> tuple[int, ...]:
    """Numbers 11 to 30 of a frame."""
    ends = (given.data_ptr(), out.data_ptr(), mode)
    if isinstance(source, AffineCodes):
        zero = source.scale if source.zero is None else source.zero
        axis = TOKEN if source.axis == "token" else CHANNEL
        places = (*_place(source.codes), *_place(source.scale), *_place(zero))
        return (
            *places,
            source.group,
            *ends,
            axis,
            source.bits,
            _KINDS[source.scale.dtype],
            tensors.zeros(source.zero),
        )
    if isinstance(source, Tensor):
        return (
            *_place(source),
            *_NOWHERE,
            *_NOWHERE,
            0,
            *ends,
            token_rows.NUMBERS,
            0,
            _KINDS[source.dtype],
            0,
        )
    by_token = source.scale.shape[-1] == 1
    ranges = (_place(t, broadcast=not by_token) for t in _ranges(source))
    starts = (*_place(source.codes), *(n for place in ranges for n in place))
    kind = token_rows.LEVELS_BY_TOKEN if by_token else token_rows.LEVELS
    return (*starts, 0, *ends, kind, source.bits, _KINDS[source.scale.dtype], 0)


def _ranges(source: LevelCodes) -> tuple[Tensor, Tensor]:
    """Scale and centre with four axes."""
    scale, centre = (t if t.dim() == 4 else t.unsqueeze(0) for t in (source.scale, source.centre))
    return scale, centre


def _levels(source: Any) -> int:
    return source.levels.data_ptr() if isinstance(source, LevelCodes) else 0


def _outliers(x: TokenRows) -> tuple[int, ...]:
    """Numbers 34 to 44 of a frame."""
    if x.outliers is None:
        return (0,) * 11
    numbers, places = x.outliers
    kind = _KINDS[numbers.dtype]
    return (numbers.shape[-1], *_place(numbers), kind, *_place(places), places.element_size())


def _steps(x: TokenRows, held: list[Tensor]) -> tuple[int, ...]:
    """Numbers 45 to 51 of a frame; `held` keeps what they point at."""
    order = length = 0
    turn = (0, 0, 0, 0, 0)
    for step in x.steps:
        if isinstance(step, Place):
            order = step.order.data_ptr()
        elif isinstance(step, Spread):
            length = step.length
        else:
            held.append(_first_partners(step.partner))
            apart = step.own.stride(0) if len(step.own) > 1 else 0
            own, other, *partners = (t.data_ptr() for t in (step.own, step.other, step.partner, held[-1]))
            turn = (own, other, apart, partners[0], partners[1])
    return (order, length, *turn)


def _first_partners(partner: Tensor) -> Tensor:
    """The partner of each first of 16 channels, -1 where the others' are not its neighbours in order."""
    runs = partner.reshape(-1, LANES)
    together = (runs - runs[:, :1] == torch.arange(LANES)).all(-1)
    return torch.where(together, runs[:, 0], -1)


def _place(tensor: Tensor, *, broadcast: bool = False) -> tuple[int, int, int, int]:
    """Address and strides in bytes of the axes b, k and row; 0 where there is one for all."""
    size, shape = tensor.element_size(), tensor.shape
    b, k, row, _ = (n * size for n in tensor.stride())
    return tensor.data_ptr(), b if shape[0] > 1 else 0, k if shape[1] > 1 else 0, 0 if broadcast else row
