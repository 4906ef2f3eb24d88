"""Encoded tokens as rows that a compiled loop can decode one after another. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class LevelCodes(NamedTuple):
    """Numbers ``centre + scale * levels[code]``.

    `codes` uint8 [..., T, ceil(C*bits/8)], a little-endian bit stream per row; `levels` float32
    [2^bits]; `centre` and `scale` [..., T, 1], or [..., 1, C] for all tokens alike.
    """

    codes: Tensor
    levels: Tensor
    centre: Tensor
    scale: Tensor
    bits: int
    channels: int


class Outliers(NamedTuple):
    """Numbers [..., T, k] that replace those at `places` (integers [..., T, k]) of each row."""

    numbers: Tensor
    places: Tensor


class Place(NamedTuple):
    """Channel j of the result is channel ``order[j]`` (int64 [C])."""

    order: Tensor


class Spread(NamedTuple):
    """Every `length` neighbours are multiplied by the transposed matrix of `kvpack.ops.hadamard`."""

    length: int


class Turn(NamedTuple):
    """Within every D channels, channel j becomes ``own * x[j] + other * x[partner[j]]``.

    `own` and `other` float32 [B or 1, T, D], `partner` int64 [D].
    """

    own: Tensor
    other: Tensor
    partner: Tensor


Step = Place | Spread | Turn
"""What may be done to the channels of a row, heads side by side, to bring it to the model's basis."""


class TokenRows(NamedTuple):
    """Encoded tokens [B, K', T, C], and how they come to the model's basis [B, K, T, D].

    `source` is a `kvpack.ops.packed_affine.AffineCodes`, `LevelCodes` or a float tensor [B, K', T, C].
    `steps` are done in order; then a row holds `heads` heads side by side, K = K' * heads.
    """

    source: Any
    outliers: Outliers | None = None
    steps: tuple[Step, ...] = ()
    heads: int = 1
