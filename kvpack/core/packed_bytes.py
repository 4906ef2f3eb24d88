"""A tensor whose bytes are stored packed: block by block, each checked before memory is set aside for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack.core.errors import ArtifactError
from kvpack.core.lazy import torch
from kvpack.core.roles import Packer
from kvpack.core.types import ITEM_BYTES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

MOST_BLOCK_BYTES = 1 << 24
_SAMPLE_BYTES = 1 << 18
_SAMPLE_PIECES = 4


@dataclass(frozen=True)
class PackedBytes(TensorSpec):
    """What a blob stands for: a tensor of `shape` and `dtype`, its bytes packed by `packer`.

    Every block stands for `block_bytes` bytes, a last one for what is left. `sizes` are their packed
    lengths in the blob, one after the other; `sha256` is the hash of the tensor's bytes.
    """

    packer: Packer
    block_bytes: int = field(metadata={"minimum": 8, "maximum": MOST_BLOCK_BYTES})
    sizes: tuple[int, ...]
    sha256: str

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"unknown dtype {self.dtype[:40]!r}")
        if any(not 0 <= n < 2**63 for n in self.shape):
            raise ValueError("impossible shape")
        if self.block_bytes % 8:
            raise ValueError("block_bytes: not a multiple of 8")
        # More than a block can take where nothing could be saved.
        if any(not 0 < size <= 2 * self.block_bytes + 4096 for size in self.sizes):
            raise ValueError("impossible sizes of blocks")
        if len(self.sizes) != -(-self.nbytes // self.block_bytes):
            raise ValueError(f"{len(self.sizes)} blocks cannot be {self.nbytes:,} bytes")

    @property
    def stored(self) -> TensorSpec:
        """The blob."""
        return TensorSpec((sum(self.sizes),), "uint8")

    def blocks(self, blob: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        """First and last byte that each block stands for, and the block."""
        at = 0
        for number, size in enumerate(self.sizes):
            start = number * self.block_bytes
            yield start, min(start + self.block_bytes, self.nbytes), blob[at : at + size]
            at += size


def sample(raw: memoryview) -> bytes:
    """Some of a tensor's bytes, from all over it, for a packer's trial."""
    piece = _SAMPLE_BYTES // _SAMPLE_PIECES
    if len(raw) <= _SAMPLE_BYTES:
        return bytes(raw)
    starts = [i * (len(raw) - piece) // (_SAMPLE_PIECES - 1) // 8 * 8 for i in range(_SAMPLE_PIECES)]
    return b"".join(bytes(raw[start : start + piece]) for start in starts)


def worthwhile(packer: Packer, raw: memoryview, dtype: str, gain: float) -> Packer | None:
    """The packer tuned to a tensor's bytes, or None where it saves less than the share `gain` of a sample."""
    tried = sample(raw)
    if not tried:
        return None
    tuned = packer.tuned(tried, dtype)
    return tuned if len(tuned.pack(tried, dtype)) < (1 - gain) * len(tried) else None


def pack(packer: Packer, raw: memoryview, dtype: str, block_bytes: int) -> Iterator[bytes]:
    """Packed blocks of a tensor's bytes, in order."""
    for start in range(0, len(raw), block_bytes):
        yield packer.pack(raw[start : start + block_bytes], dtype)


def unpack(blob: Tensor, packed: PackedBytes, name: str, *, where: str = "", hashed: bool = False) -> Tensor:
    """The tensor that `blob`, uint8 [bytes], stands for, on the device of `blob`.

    Args:
        blob: the packed bytes.
        packed: what they stand for.
        name: of the tensor, for errors.
        where: file or folder, for errors.
        hashed: also compare the hash of the result; blocks have checksums of their own.

    Raises:
        ArtifactError: a block is damaged, or is not what was announced; the second is found before
            anything is allocated.
    """
    view = blob.detach().cpu().numpy().data
    if len(view) != sum(packed.sizes):
        raise ArtifactError(f"{name} is {len(view):,} bytes, not {sum(packed.sizes):,}", where=where)
    for number, (start, stop, block) in enumerate(packed.blocks(view)):
        with _Block(packed, number, name, where):
            packed.packer.check(block, packed.dtype, stop - start)
    raw = torch.empty(packed.nbytes, dtype=torch.uint8)
    for number, (start, stop, block) in enumerate(packed.blocks(view)):
        with _Block(packed, number, name, where):
            packed.packer.unpack(block, packed.dtype, raw[start:stop])
    if hashed and hashlib.sha256(raw.numpy().data).hexdigest() != packed.sha256:
        raise ArtifactError(f"{name} unpacks to other bytes than were packed", where=where)
    return raw.view(getattr(torch, packed.dtype)).reshape(packed.shape).to(blob.device)


class _Block:
    """What is wrong with a block becomes an error that names it."""

    def __init__(self, packed: PackedBytes, number: int, name: str, where: str) -> None:
        self.label = f"{name}, block {number} of {len(packed.sizes)}"
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, LookupError)):
            raise ArtifactError(
                f"{self.label} {error}",
                where=self.where,
                hint="copy or download this file again; `kvpack export` makes the same bytes",
            ) from error


def first_bad_block(blob: Tensor, packed: PackedBytes) -> int | None:
    """Number of the first block of `blob` that does not unpack; None where all do."""
    blocks = enumerate(packed.blocks(blob.numpy().data))
    return next((n for n, (start, stop, block) in blocks if _bad(packed, block, stop - start)), None)


def _bad(packed: PackedBytes, block: memoryview, raw_bytes: int) -> bool:
    try:
        packed.packer.check(block, packed.dtype, raw_bytes)
        packed.packer.unpack(block, packed.dtype, torch.empty(raw_bytes, dtype=torch.uint8))
    except (ValueError, LookupError):
        return True
    return False
