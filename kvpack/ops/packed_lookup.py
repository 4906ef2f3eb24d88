"""Numbers that are looked up by their codes, as they are stored: bit streams beside levels or codebooks.

`kvpack.kernels.lookup` has twins that never hold decoded numbers in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.ops import bits, masks, mirrored


def levels(codes: Tensor, small: Tensor, large: Tensor, size: int, channels: int) -> Tensor:
    """Numbers ``{-large, -small, small, large}``, float32 [..., T, D].

    Args:
        codes: uint8 [..., T, ceil(D/4)].
        small: [..., T, ceil(D/size)].
        large: as `small`.
        size: channels that share a pair of magnitudes.
        channels: D.
    """
    grid = {"small": small, "large": large}
    return mirrored.value(bits.unpack(codes, 2, channels), grid, size)


def vectors(codes: Tensor, scale: Tensor, books: Tensor, width: int, group: int, channels: int) -> Tensor:
    """Vectors of a codebook times factors, float32 [..., T, D].

    Args:
        codes: uint8 [..., T, bytes], D/size codes of `width` bits (`kvpack.ops.bits.pack_wide`).
        scale: a factor for every group [..., T, G].
        books: float32 [G, 2^width, size].
        width: bits of a code.
        group: channels that share a factor and a codebook.
        channels: D.
    """
    size = books.shape[-1]
    places = bits.unpack_wide(codes, width, channels // size)
    own = torch.arange(places.shape[-1], device=places.device) // (group // size)
    found = books.flatten(0, 1)[places + own * 2**width]
    return (found * scale.float()[..., own].unsqueeze(-1)).flatten(-2)


def opened(values: Tensor, mask: Tensor, keep: int, of: int, channels: int) -> Tensor:
    """Kept numbers [..., T, D'] between zeros: [..., T, D] with D = `channels`.

    Args:
        values: what is kept, `keep` for every `of` channels.
        mask: the numbers of the patterns, bits of `masks.index_bits` [..., T, bytes].
        keep: N of N:M.
        of: M.
        channels: D; a last group may go beyond it.
    """
    numbers = bits.unpack(mask, masks.index_bits(keep, of), -(-channels // of))
    return masks.opened(values, masks.kept_by(numbers, keep, of))[..., :channels].contiguous()
