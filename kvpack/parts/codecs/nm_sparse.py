"""N of every M neighbouring channels kept, and what is kept left to another codec."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack import kernels, ops
from kvpack.core.errors import RecipeError
from kvpack.core.lazy import torch
from kvpack.core.roles import Codec, MaskedCodec
from kvpack.core.types import CodedRows, Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NmSparse(MaskedCodec):
    """Zeros but for `keep` of every `of` channels; `codec` sees only these, side by side.

    Without a solver the largest numbers are kept. A group of `codec` therefore spans of/keep times as
    many of the original channels: size 64 under 2 of 4 spans 128. Channels that do not fill a last
    group are filled up with zeros.

    Payload for [..., T, D] with m = ceil(D/of): "mask" uint8 [..., T, ceil(m*i/8)], i bits for the
    number of each group's pattern (3 for 2 of 4), and `codec`'s own for [..., T, m*keep].
    2 of 4 with 2-bit codes take 3/4 + 2*2/4 = 1.75 bits per number and the codec's scales: with an
    index to pay for, hardly less than all channels in 2 bits. Source: AccLLM, arXiv 2505.03745.

    Raises:
        RecipeError: nothing to prune or to keep, or a codec that learns.
    """

    codec: Codec
    keep: int = field(default=2, metadata={"minimum": 1})
    of: int = field(default=4, metadata={"minimum": 2, "maximum": 8})

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of <= 8:
            raise RecipeError(f"{self.keep} of {self.of} channels cannot be kept", hint="use 2 of 4")
        if isinstance(self.codec, MaskedCodec) or self.codec.requires():
            raise RecipeError(
                f"nm_sparse cannot hold {type(self.codec).__name__}",
                why="its codec must know all it needs from what is kept, and keep all of it",
                hint="use a codec that learns nothing, such as affine",
            )

    @property
    def survivors(self) -> Codec:
        """`codec`."""
        return self.codec

    @property
    def token_block(self) -> int:
        """That of `codec`."""
        return self.codec.token_block

    @property
    def segment(self) -> int:
        """That of `codec`."""
        return self.codec.segment

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Masks, and the payload of `codec`."""
        *outer, channels = shape
        groups = -(-channels // self.of)
        bits = (math.comb(self.of, self.keep) - 1).bit_length()
        return {
            "mask": TensorSpec((*outer, (groups * bits + 7) // 8), "uint8"),
            **self.codec.spec((*outer, groups * self.keep), dtype),
        }

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Keep the largest numbers and encode them."""
        full = ops.masks.filled(x, self.of)
        # What fills up the last group is kept only where there is nothing else.
        score = ops.masks.filled(x.float().abs().nan_to_num(0.0), self.of, -1.0)
        kept = ops.masks.largest(score, self.keep, self.of)
        payload = self.codec.encode(ops.masks.closed(full, kept), {}, valid)
        return self.join(kept, Payload(payload.tensors, tuple(x.shape)))

    def join(self, kept: Tensor, payload: Payload) -> Payload:
        """Masks beside what `codec` made of the kept channels; `payload.shape` is that of the whole."""
        bits = (math.comb(self.of, self.keep) - 1).bit_length()
        mask = ops.bits.pack(ops.masks.numbers(kept, self.keep, self.of), bits)
        return Payload({"mask": mask, **payload.tensors}, payload.shape)

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """What `codec` decodes to, between zeros."""
        rows = self.coded_rows(payload, state)
        if rows is not None:
            return kernels.lookup.dense(rows, dtype)
        values = self.codec.decode(self._kept(payload), {}, dtype)
        mask, channels = payload.tensors["mask"], payload.shape[-1]
        return ops.packed_lookup.opened(values, mask, self.keep, self.of, channels)

    def coded_rows(self, payload: Payload, state: State) -> CodedRows | None:
        """Those of `codec`, where it has any, and the masks."""
        rows = self.codec.coded_rows(self._kept(payload), {})
        if rows is None:
            return None
        mask = payload.tensors["mask"]
        return rows._replace(channels=payload.shape[-1], mask=mask, keep=self.keep, of=self.of)

    @property
    def reads_codes(self) -> bool:
        """Whether rows of `codec` stand alone and are read without decoding."""
        return self.codec.reads_codes and self.codec.token_block == 1

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """Products with what is kept."""
        rows = self.coded_rows(payload, state)
        return super().scores(query, payload, state) if rows is None else kernels.lookup.scores(query, rows)

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """Sums of what is kept."""
        rows = self.coded_rows(payload, state)
        return super().mix(weights, payload, state) if rows is None else kernels.lookup.mix(weights, rows)

    def _kept(self, payload: Payload) -> Payload:
        """The payload of `codec`."""
        *outer, channels = payload.shape
        own = {name: tensor for name, tensor in payload.tensors.items() if name != "mask"}
        return Payload(own, (*outer, -(-channels // self.of) * self.keep))
