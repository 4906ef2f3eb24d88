"""Zstandard: matches and entropy coding (RFC 8878)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zstandard

from kvpack.core.roles import Packer

if TYPE_CHECKING:
    from torch import Tensor

    from kvpack.core.roles.packers import Buffer

MOST_BYTES = 1 << 24
"""Largest content and window of a frame that is read."""


@dataclass(frozen=True)
class Zstd(Packer):
    """One zstd frame per block, with content size and checksum.

    Independent codes have no repetitions, only an uneven histogram. Levels 1 to 12 then lose up to a
    quarter to matches that cost more than they save, hence the trial.

    `levels` are tried in this order; a later one is taken where it takes the share `margin` less than
    the best before it: high levels pack some hundred times slower than low ones. Level 0 stands for
    entropy coding nearly alone (few candidates for matches, of 7 bytes at least), the others are zstd's
    own.
    """

    levels: tuple[int, ...] = field(default=(0, 1, 19), metadata={"minimum": 0, "maximum": 22})
    margin: float = field(default=0.03, metadata={"minimum": 0.0, "maximum": 1.0})

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels: give at least one")

    def tuned(self, sample: Buffer, dtype: str) -> Zstd:
        """With the one level that suits `sample`."""
        best, least = self.levels[0], float("inf")
        for level in self.levels:
            size = len(_compressor(level).compress(sample))
            if size < least * (1 - self.margin):
                best, least = level, size
        return dataclasses.replace(self, levels=(best,))

    def pack(self, raw: Buffer, dtype: str) -> bytes:
        """A frame at the first level."""
        return bytes(_compressor(self.levels[0]).compress(raw))

    def check(self, packed: Buffer, dtype: str, raw_bytes: int) -> None:
        """The frame's header: content size, window, checksum, no dictionary."""
        try:
            stated = zstandard.get_frame_parameters(packed)
        except zstandard.ZstdError as error:
            raise ValueError(f"is no zstd frame: {error}") from error
        if stated.content_size != raw_bytes:
            raise ValueError(f"would become {stated.content_size:,} bytes, announced are {raw_bytes:,}")
        if max(stated.content_size, stated.window_size) > MOST_BYTES:
            raise ValueError(f"needs a window of {stated.window_size:,} bytes")
        if not stated.has_checksum or stated.dict_id:
            raise ValueError("has no checksum, or needs a dictionary")

    def unpack(self, packed: Buffer, dtype: str, out: Tensor) -> None:
        """Decode the frame, whose checksum zstd compares."""
        self.check(packed, dtype, out.numel())
        try:
            raw = zstandard.ZstdDecompressor(max_window_size=MOST_BYTES).decompress(
                packed, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise ValueError(f"is damaged: {error}") from error
        out.numpy().data[:] = raw


def _compressor(level: int) -> zstandard.ZstdCompressor:
    if level:
        return zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_LAZY2,
        min_match=7,
        hash_log=6,
        chain_log=6,
        search_log=1,
        window_log=18,
        write_checksum=True,
        write_content_size=True,
    )
    return zstandard.ZstdCompressor(compression_params=parameters)
