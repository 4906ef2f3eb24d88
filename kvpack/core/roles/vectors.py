"""The codecs whose codes stand for several neighbouring channels at once."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from kvpack.core.roles.compression import Codec
from kvpack.core.types import Payload, State

if TYPE_CHECKING:
    from torch import Tensor


class VectorCodec(Codec):
    """``x ~ scale * c[code]``: vectors of `size` channels, each coded as a place in a codebook.

    Codebooks hold 2^`bits` vectors. Groups of channels have a codebook each, and every token (or
    weight row) one scale per group. A solver makes the codebooks and chooses the codes.
    """

    size: int
    bits: int

    @abstractmethod
    def group_size(self, channels: int) -> int:
        """Channels that share a codebook, for a last axis of `channels`: a multiple of `size`."""

    @abstractmethod
    def scales(self, x: Tensor) -> Tensor:
        """One positive scale, or 0 for nothing but zeros, per group of `x` [..., T, D]: [..., T, B]."""

    @abstractmethod
    def store(self, books: Tensor) -> State:
        """The state that holds the codebooks [B, 2^bits, size], rounded as they are stored."""

    @abstractmethod
    def books(self, state: State) -> Tensor:
        """The codebooks that a state holds, float32."""

    @abstractmethod
    def assemble(self, codes: Tensor, scales: Tensor) -> Payload:
        """Pack codes [..., T, D/size] beside the scales."""
