"""Byte planes: the exponents of floating-point numbers coded apart from sign and mantissa."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.lazy import torch
from kvpack.core.roles import Packer
from kvpack.core.types import ITEM_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from kvpack.core.roles.packers import Buffer

_LENGTH_BYTES = 4


@dataclass(frozen=True)
class BytePlanes(Packer):
    """Every plane of bytes packed on its own (Hershcovitch et al., ZipNN, arXiv 2411.05239).

    The exponents of trained weights take few values; sign and mantissa are noise. Items of floating
    point are turned by one bit, so that a bfloat16 falls into its exponent and the rest. A block is
    the length of every plane but the last (uint32, little-endian), then the packed planes, the most
    significant first.

    `packers` is one for all planes, or one for each.
    """

    packers: tuple[Packer, ...]

    def __post_init__(self) -> None:
        if not self.packers:
            raise ValueError("packers: give at least one")

    def tuned(self, sample: Buffer, dtype: str) -> BytePlanes:
        """With a packer for every plane, each tuned to it."""
        planes = _split(sample, dtype)
        tuned = [self._packer(i).tuned(plane, "uint8") for i, plane in enumerate(planes)]
        return dataclasses.replace(self, packers=tuple(tuned))

    def pack(self, raw: Buffer, dtype: str) -> bytes:
        """All planes, one after the other."""
        packed = [self._packer(i).pack(plane, "uint8") for i, plane in enumerate(_split(raw, dtype))]
        lengths = [len(piece).to_bytes(_LENGTH_BYTES, "little") for piece in packed[:-1]]
        return b"".join([*lengths, *packed])

    def check(self, packed: Buffer, dtype: str, raw_bytes: int) -> None:
        """The lengths add up, and every plane holds what it should."""
        item = ITEM_BYTES[dtype]
        if raw_bytes % item:
            raise ValueError(f"{raw_bytes:,} bytes are no whole items of {dtype}")
        for i, piece in enumerate(_pieces(packed, item)):
            self._packer(i).check(piece, "uint8", raw_bytes // item)

    def unpack(self, packed: Buffer, dtype: str, out: Tensor) -> None:
        """Unpack the planes and put the items together."""
        item = ITEM_BYTES[dtype]
        planes = [torch.empty(out.numel() // item, dtype=torch.uint8) for _ in range(item)]
        for i, (piece, plane) in enumerate(zip(_pieces(packed, item), planes, strict=True)):
            self._packer(i).unpack(piece, "uint8", plane)
        ops.byte_planes.join(planes, out, turn="float" in dtype)

    def _packer(self, plane: int) -> Packer:
        if len(self.packers) == 1:
            return self.packers[0]
        if plane >= len(self.packers):
            raise ValueError(f"has {len(self.packers)} packers and more planes")
        return self.packers[plane]


def _split(raw: Buffer, dtype: str) -> list[memoryview]:
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if len(raw) else torch.empty(0).byte()
    planes = ops.byte_planes.split(tensor, ITEM_BYTES[dtype], turn="float" in dtype)
    return [plane.numpy().data for plane in planes]


def _pieces(packed: Buffer, planes: int) -> list[memoryview]:
    """The packed planes of a block.

    Raises:
        ValueError: it is shorter than its lengths say.
    """
    view, at, pieces = memoryview(packed), (planes - 1) * _LENGTH_BYTES, []
    lengths = [
        int.from_bytes(view[i * _LENGTH_BYTES : (i + 1) * _LENGTH_BYTES], "little") for i in range(planes - 1)
    ]
    if at + sum(lengths) > len(view):
        raise ValueError("is shorter than its planes")
    for length in lengths:
        pieces.append(view[at : at + length])
        at += length
    return [*pieces, view[at:]]
