"""A codec that works on a fixed orthonormal transform of the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.lazy import torch
from kvpack.core.nested import inside, prefixed
from kvpack.core.roles import Codec
from kvpack.core.types import Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InBasis(Codec):
    """Encodes the channels of every token in the basis `basis` with `codec`.

    A transform changes the basis of a whole plane; this does so where only a codec stands, for
    example for some of the channels, or of an attention input. Both bases take any number E of
    channels and store E real numbers: "fft" is the Fourier transform (`kvpack.ops.fourier`),
    "hadamard" the rotation that spreads outliers over all channels (`kvpack.ops.hadamard`).

    Payload: that of `codec`, named "codec.…". Sources: VidKV, arXiv 2503.16257, section 3, figure 3;
    QuaRot, arXiv 2404.00456, for the rotation.

    Raises:
        RecipeError: `codec` wants statistics, which nobody measures in this basis.
    """

    codec: Codec
    basis: Literal["fft", "hadamard"] = "fft"

    def __post_init__(self) -> None:
        if self.codec.requires():
            raise RecipeError(
                f"codec {type(self.codec).__name__} cannot work in another basis",
                why="it learns from calibration, which measures the plane as it is",
                hint="use a codec that learns nothing",
            )

    @property
    def token_block(self) -> int:
        """That of `codec`."""
        return self.codec.token_block

    @property
    def segment(self) -> int:
        """That of `codec`."""
        return self.codec.segment

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """The payload of `codec`, which receives float32."""
        return prefixed("codec", self.codec.spec(shape, "float32"))

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Transform, then encode."""
        payload = self.codec.encode(self._there(x), {}, valid)
        return Payload(prefixed("codec", payload.tensors), tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """Decode, then transform back."""
        inner = Payload(inside("codec", payload.tensors), payload.shape)
        return self._back(self.codec.decode(inner, {}, torch.float32)).to(dtype)

    @property
    def reads_codes(self) -> bool:
        """Where `codec` does: the basis is orthonormal."""
        return self.codec.reads_codes

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """Products of transformed queries."""
        inner = Payload(inside("codec", payload.tensors), payload.shape)
        return self.codec.scores(self._there(query), inner, {})

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """Sums, transformed back."""
        inner = Payload(inside("codec", payload.tensors), payload.shape)
        return self._back(self.codec.mix(weights, inner, {}))

    def _there(self, x: Tensor) -> Tensor:
        return ops.fourier.forward(x) if self.basis == "fft" else ops.hadamard.transform(x.float())

    def _back(self, x: Tensor) -> Tensor:
        if self.basis == "fft":
            return ops.fourier.inverse(x)
        return ops.hadamard.transform(x, inverse=True)
