"""The uniform quantiser: ranges, grids, codes and values of grouped numbers.

Three grids share one shape of code. With b bits, L = 2^b - 1, h = 2^(b-1), a group's range [m, M]
and its step s:

- ``float``   x = q*s + m,     s = (M - m)/L          (KIVI, arXiv 2402.02750, section 3.1)
- ``integer`` x = (q - z)*s,   z = round(-m/s)        (RotateKV, arXiv 2501.16383, section 3)
- ``none``    x = (q - h)*s,   s = max(M/(h-1), -m/h) (symmetric about zero)

Steps and zeros are rounded to their stored dtype before any code is chosen, the step upwards and
the float zero downwards: the stored grid spans the whole range, so that no error exceeds s/2. Only
the step of a clipped range, which bounds no error anyway, is rounded to nearest. The integer zero
is stored as z - h in int8; a step is widened where z would not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grid = dict[str, Tensor]


def group_size(channels: int, size: int) -> int:
    """Channels in a full group of `size` (0: all) on an axis of `channels`."""
    return min(size, channels) if size else channels


def split(x: Tensor, axis: str, size: int) -> Tensor:
    """Give groups an axis of their own.

    Returns:
        "channel": [..., T, D] -> [..., T, ceil(D/size), size], a short last group filled up with
        its last channel, which leaves its range alone. "token": [..., T/size, size, D]; a size of
        0 is the whole axis.
    """
    if axis == "token":
        size = size or x.shape[-2]
        return torch.unflatten(x, -2, (x.shape[-2] // size, size))
    channels = x.shape[-1]
    size = group_size(channels, size)
    if missing := -channels % size:
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), -1)
    return torch.unflatten(x, -1, (x.shape[-1] // size, size))


def join(x: Tensor, axis: str, channels: int) -> Tensor:
    """Invert `split` for a last axis of `channels`."""
    return x.flatten(-3, -2) if axis == "token" else x.flatten(-2)[..., :channels]


def group_axis(axis: str) -> int:
    """The axis that `split` gave to the members of a group."""
    return -2 if axis == "token" else -1


def value_range(x: Tensor, dim: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and greatest number along `dim`, `dim` removed.

    Where `valid` (broadcast against `x`) is False a number does not count; a range without any
    valid number is (0, 0).
    """
    if valid is None:
        return x.amin(dim), x.amax(dim)
    some = valid.any(dim)
    low = x.masked_fill(~valid, torch.inf).amin(dim)
    high = x.masked_fill(~valid, -torch.inf).amax(dim)
    return torch.where(some, low, 0.0), torch.where(some, high, 0.0)


def fit(low: Tensor, high: Tensor, bits: int, zero: str, scale_dtype: torch.dtype, clip: float) -> Grid:
    """The grid for groups with ranges [low, high], shrunk by the factor `clip`.

    Args:
        low: float32, any shape.
        high: float32, same shape.
        bits: width of a code, 1 to 8 (2 to 8 for a symmetric grid).
        zero: "float", "integer" or "none".
        scale_dtype: stored dtype of the step; the float zero shares it, but is float16 beside a
            float8 step, because three mantissa bits would move the whole group.
        clip: factor in (0, 1] on the distance of both ends from zero, or from the end nearest to it.

    Returns:
        "scale" and, unless `zero` is "none", "zero" (int8 for integer zeros), shaped as `low`.
    """
    if clip != 1.0:
        # The papers multiply both ends by `clip`, which would move a range that excludes zero off
        # its numbers; shrinking towards the number nearest to zero is the same for all others.
        centre = torch.zeros_like(low).clamp(low, high)
        low, high = torch.lerp(centre, low, clip), torch.lerp(centre, high, clip)
    half = 2 ** (bits - 1)
    levels = 2**bits - 1
    if zero == "float":
        offset = round_towards(low, torch.float16 if scale_dtype.itemsize == 1 else scale_dtype, up=False)
        step = _natural((high - offset.float()) / levels, scale_dtype, clip)
        return {"scale": _stored(step, scale_dtype), "zero": offset}
    if zero == "none":
        step = _natural(torch.maximum(high / (half - 1), -low / half), scale_dtype, clip)
        return {"scale": _stored(step, scale_dtype)}
    step = _natural((high - low) / levels, scale_dtype, clip)
    scale = _stored(_widened(step, low, high, bits), scale_dtype)
    centred = (-low / scale.float()).round().clamp(half - 128, half + 127) - half
    return {"scale": scale, "zero": centred.nan_to_num(0.0).to(torch.int8)}


def codes(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Nearest codes of `x`, uint8; `scale` and `zero` broadcast against it."""
    step = scale.float()
    if zero is not None and zero.dtype.is_floating_point:
        q = (x - zero.float()).div_(step).round_()
    else:
        q = (x / step).round_().add_(_zero_code(zero, bits))
    # By way of int16, because CPUs have no instruction from floats to bytes.
    return q.nan_to_num_(0.0).clamp_(0, 2**bits - 1).to(torch.int16).to(torch.uint8)


def values(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The numbers that codes `q` stand for, float32."""
    step = scale.float()
    if zero is not None and zero.dtype.is_floating_point:
        return q.float().mul_(step).add_(zero.float())
    return q.float().sub_(_zero_code(zero, bits)).mul_(step)


def even(scale: Tensor, zero: Tensor | None, bits: int) -> tuple[Tensor, Tensor, bool]:
    """Steps and offsets float32; numbers are ``code * step + offset``, if True ``(code - offset) * step``."""
    step = scale.float()
    if zero is not None and zero.dtype.is_floating_point:
        return step, zero.float(), False
    return step, torch.zeros_like(step) + _zero_code(zero, bits), True


def round_towards(x: Tensor, dtype: torch.dtype, *, up: bool) -> Tensor:
    """Round `x` to the nearest number of `dtype` that is not below (`up`) or not above it.

    Numbers beyond the range of `dtype` become its largest finite ones.
    """
    limit = torch.finfo(dtype).max
    x = x.float().clamp(-limit, limit)
    y = x.to(dtype)
    if dtype == torch.float32:
        return y
    wrong = (y.float() < x) if up else (y.float() > x)
    # Floats are sign and magnitude: the neighbour is one step of the integer with the same bits.
    word = y.view(torch.int16 if dtype.itemsize == 2 else torch.int8)
    outward = (word >= 0) if up else (word < 0)
    return (word + torch.where(outward, wrong.int(), -wrong.int()).to(word.dtype)).view(dtype)


def _natural(step: Tensor, dtype: torch.dtype, clip: float) -> Tensor:
    """The step that a range asks for; that of a clipped range already rounded to nearest."""
    if clip == 1.0:
        return step
    limit = torch.finfo(dtype).max
    nearest = step.clamp(max=limit).to(dtype).float()
    return torch.where(nearest == 0, step, nearest)


def _stored(step: Tensor, dtype: torch.dtype) -> Tensor:
    """A step rounded up, and 1 where a group is constant."""
    step = step.clamp(min=0)
    return round_towards(torch.where(step == 0, 1.0, step), dtype, up=True)


def _widened(step: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The least step, from `step` upwards, with which an int8 zero reaches the range."""
    half, levels = 2 ** (bits - 1), 2**bits - 1
    step = torch.maximum(step, -low / (127 + half))
    reach = torch.minimum(low / (128 - half), high / levels) if half < 128 else high / levels
    # A constant c needs no resolution, only a step that divides it: c/64 is as exact as c.
    return torch.where(low == high, low.abs() / 64, torch.where(low > 0, torch.maximum(step, reach), step))


def _zero_code(zero: Tensor | None, bits: int) -> Tensor | float:
    half = 2 ** (bits - 1)
    return float(half) if zero is None else zero.float() + half
