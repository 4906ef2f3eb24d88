"""The role that answers how the bytes of a tensor become fewer bytes, exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from kvpack.core.roles.part import Part

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    Buffer = bytes | bytearray | memoryview


class Packer(Part, ABC):
    """Lossless coding of blocks of a tensor's bytes; every block stands alone and carries a checksum.

    `dtype` is the torch dtype name of the tensor whose bytes are packed, item by item in row-major
    order, little-endian; blocks hold whole items.
    """

    @abstractmethod
    def tuned(self, sample: Buffer, dtype: str) -> Self:
        """This packer with its choices made for one tensor, by trial on `sample`; always the same ones."""

    @abstractmethod
    def pack(self, raw: Buffer, dtype: str) -> bytes:
        """One block, packed; equal input gives equal output."""

    @abstractmethod
    def check(self, packed: Buffer, dtype: str, raw_bytes: int) -> None:
        """Check what a block says of itself against `raw_bytes`; allocates nothing of that size.

        Raises:
            ValueError: it would not become `raw_bytes` bytes, or needs more memory than that.
        """

    @abstractmethod
    def unpack(self, packed: Buffer, dtype: str, out: Tensor) -> None:
        """Write one block back into `out`, uint8 [bytes of the block]; releases the interpreter's lock.

        Raises:
            ValueError: the block is damaged.
        """
