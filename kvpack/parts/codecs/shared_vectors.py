"""Vectors of neighbouring channels, coded as places in a codebook that all rows share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.lazy import torch
from kvpack.core.roles import VectorCodec
from kvpack.core.types import CodedRows, Payload, Shape, Stat, State, Stats, TensorSpec
from kvpack.kernels.codecs import LookupCodec

if TYPE_CHECKING:
    from torch import Tensor

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class SharedVectors(LookupCodec, VectorCodec):
    """Plain vector quantisation: `size` neighbouring channels become one code of `bits` bits.

    The codebook of 2^bits vectors is shared by all rows of a weight (all tokens and heads of a
    plane). Before it is asked, a row is divided by its root mean square. `columns` channels share
    a codebook and, row by row, a scale; 0 means all. That is bits/size bits per weight, and for a
    weight [R, C] in B = ceil(C/columns) groups 16 B / C for scales and 16 B 2^bits size / (R C) for
    codebooks (half of that in float8): a layer of 192 x 192 pays 0.44 bits for 256 vectors of 4, one
    of 4096 x 4096 pays 0.001.

    Payload for [..., T, D]: "codes" uint8 [..., T, ceil(D/size*bits/8)], "scale" float16 [..., T, B].
    State: "codebook" [B, 2^bits, size] in `codebook_dtype`. Codes are assigned in float32. Source:
    the plain form of GPTVQ, arXiv 2402.15319, section 3.

    Raises:
        RecipeError: settings that contradict each other.
    """

    bits: int = field(metadata={"minimum": 1, "maximum": 16})
    size: int = field(default=4, metadata={"minimum": 1, "maximum": 16})
    columns: int = field(default=0, metadata={"minimum": 0})
    codebook_dtype: Literal["float16", "float8_e4m3fn"] = "float16"

    def __post_init__(self) -> None:
        if self.columns % self.size:
            raise RecipeError(
                f"shared_vectors: groups of {self.columns} channels cut vectors of {self.size} in two",
                hint=f"set columns to a multiple of {self.size}, or to 0",
            )

    def group_size(self, channels: int) -> int:
        """`columns`, or all channels."""
        return min(self.columns or channels, channels)

    def requires(self) -> frozenset[Stat]:
        """All tokens, where no solver makes the codebooks."""
        return frozenset({Stat("all_rows")})

    def fit(self, stats: Stats) -> State:
        """Codebooks by k-means of calibration tokens.

        Raises:
            KvpackError: tokens were not measured, or are not finite.
        """
        rows = stats["all_rows"]["rows"] if "all_rows" in stats else None
        if rows is None or not bool(rows.isfinite().all()):
            fact = "were not measured" if rows is None else "are not finite"
            raise KvpackError(
                f"shared_vectors: all_rows {fact}", hint="calibrate with sound text and weights"
            )
        vectors = torch.split(self._vectors(rows, self.scales(rows)), self._per_group(rows.shape[-1]), -2)
        ones = torch.ones(1, self.size)
        points = [part.reshape(1, -1, self.size) for part in vectors]
        books = [
            ops.kmeans_vectors.fit_weighted(part, torch.ones(part.shape[:2]), ones, 2**self.bits)
            for part in points
        ]
        return self.store(torch.stack(books))

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """The codebooks."""
        books = self._groups(shape[-1])
        return {"codebook": TensorSpec((books, 2**self.bits, self.size), self.codebook_dtype)}

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Codes and scales.

        Raises:
            RecipeError: the channels are no whole number of vectors.
        """
        *outer, channels = shape
        groups = self._groups(channels)
        return {
            "codes": TensorSpec((*outer, (channels // self.size * self.bits + 7) // 8), "uint8"),
            "scale": TensorSpec((*outer, groups), "float16"),
        }

    def scales(self, x: Tensor) -> Tensor:
        """Root mean square of every group of channels, float16."""
        groups = torch.split(x.float(), self.group_size(x.shape[-1]), -1)
        largest = [part.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) for part in groups]
        means = [
            (part / top.unsqueeze(-1)).square().mean(-1).sqrt() * top
            for part, top in zip(groups, largest, strict=True)
        ]
        return torch.stack(means, -1).clamp(max=FLOAT16_MAX).half()

    def store(self, books: Tensor) -> State:
        """Codebooks in `codebook_dtype`."""
        return {"codebook": books.to(getattr(torch, self.codebook_dtype))}

    def books(self, state: State) -> Tensor:
        """Codebooks in float32."""
        return state["codebook"].float()

    def assemble(self, codes: Tensor, scales: Tensor) -> Payload:
        """Pack codes [..., T, D/size] beside the scales."""
        packed = ops.bits.pack_wide(codes, self.bits)
        shape = (*codes.shape[:-1], codes.shape[-1] * self.size)
        return Payload({"codes": packed, "scale": scales}, shape)

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """The nearest vector of the codebook, each on its own."""
        scales = self.scales(x)
        vectors = torch.split(self._vectors(x, scales), self._per_group(x.shape[-1]), -2)
        books = self.books(state)
        codes = [
            ops.kmeans_vectors.assign(part.reshape(-1, self.size), book)[0].reshape(part.shape[:-1])
            for part, book in zip(vectors, books, strict=True)
        ]
        return self.assemble(torch.cat(codes, -1), scales)

    def coded_rows(self, payload: Payload, state: State) -> CodedRows:
        """Codes, factors of the groups, codebooks."""
        codes, scale, channels = payload.tensors["codes"], payload.tensors["scale"], payload.shape[-1]
        books, group = self.books(state).contiguous(), self.group_size(channels)
        return CodedRows("vectors", codes, self.bits, channels, group, scale, books, channels)

    def _vectors(self, x: Tensor, scales: Tensor) -> Tensor:
        """[..., T, D] divided by its scales and cut into [..., T, D/size, size]."""
        cut = torch.unflatten(x.float(), -1, (-1, self.size))
        own = torch.arange(cut.shape[-2], device=x.device) // self._per_group(x.shape[-1])
        scale = scales.float()[..., own].unsqueeze(-1)
        return cut / torch.where(scale == 0, 1.0, scale)

    def _per_group(self, channels: int) -> int:
        return self.group_size(channels) // self.size

    def _groups(self, channels: int) -> int:
        """How many codebooks `channels` channels need."""
        if channels % self.size:
            fits = max(n for n in range(1, self.size) if channels % n == 0)
            raise RecipeError(
                f"shared_vectors: {channels} channels are no whole number of vectors of {self.size}",
                hint=f"set size to {fits}",
            )
        return -(-channels // self.group_size(channels))
