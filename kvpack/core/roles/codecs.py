"""The role of codecs, numbers as fewer bytes, and the codecs that let a solver choose their codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from kvpack.core.lazy import torch
from kvpack.core.roles.part import Part
from kvpack.core.rows import TokenRows
from kvpack.core.types import CodedRows, EvenGrid, Payload, Shape, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class Codec(Part, ABC):
    """An approximation of a block of numbers [..., T, D] by fewer bytes.

    Every payload tensor keeps its token axis at -2 with a fixed number of rows per token block,
    so that encoding blocks one after another and concatenating equals encoding them together.
    That is what makes a cache append-only. Codecs with a `segment` are free of this: a cache keeps
    their segments apart.
    """

    @property
    def token_block(self) -> int:
        """Tokens that must be encoded together; 1 when each token stands alone."""
        return 1

    @property
    def segment(self) -> int:
        """Most tokens that are encoded as one segment; 0 when payloads can be concatenated.

        What is encoded as a segment can only be decoded as a whole, and its payload may have any
        shapes with the batch axis first.
        """
        return 0

    @abstractmethod
    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Payload tensors for an input [..., T, D] of `dtype`, before any data exists.

        T must be a multiple of `token_block`.
        """

    @abstractmethod
    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Encode `x` [..., T, D]. Tokens where `valid` [B, T] is False do not shape statistics."""

    @abstractmethod
    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The approximation, [..., T, D] in `dtype`."""

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """Products of queries [..., R, D] with the encoded tokens [..., T, D]: float32 [..., R, T].

        By default through `decode`; a codec that has a shorter way overrides this.
        """
        query = query.float()
        return query @ self.decode(payload, state, query.dtype).mT

    def multiplier(self, payload: Payload, state: State) -> Callable[[Tensor], Tensor]:
        """What multiplies rows with the same payload [R, C] again and again: x [N, C] to x W^T [N, R].

        Products have the dtype of x. Whatever does not depend on x may be found once: the payload's
        tensors must stay where they are. By default through `scores`.
        """
        return lambda x: self.scores(x, payload, state).to(x.dtype)

    def products_of_codes(self, codec: Codec, x: Payload, payload: Payload, state: State) -> Tensor | None:
        """Products x W^T [N, R] of this payload [R, C] with rows [1, 1, N, C] that another codec has coded.

        float32, from both codes at once; None, the default, where no kernel does that.
        """
        return None

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """Sums of the encoded tokens [..., T, D] with weights [..., M, T]: float32 [..., M, D].

        By default through `decode`, as `scores`.
        """
        weights = weights.float()
        return weights @ self.decode(payload, state, weights.dtype)

    def attend(
        self,
        query: Tensor,
        payload: Payload,
        values: Codec,
        value_payload: Payload,
        start: int,
        tokens: int,
        mask: Tensor | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Unnormalised attention over keys of this codec and values of another in one kernel.

        None, the default, where there is none; arguments and results as of `kvpack.kernels.affine.attention`.
        """
        return None

    exact: ClassVar[bool] = False
    """Whether `decode` gives back what was encoded, bit for bit."""

    @property
    def reads_codes(self) -> bool:
        """Whether `scores` and `mix` compute on the codes, without holding decoded tokens."""
        return self.in_rows

    @property
    def in_rows(self) -> bool:
        """Whether `token_rows` are what is stored, so that compiled loops decode one token after another."""
        return False

    def token_rows(self, payload: Payload, state: State) -> TokenRows:
        """The tokens as compiled loops read them: by default decoded, all at once."""
        return TokenRows(self.decode(payload, state, torch.float32))

    def coded_rows(self, payload: Payload, state: State) -> CodedRows | None:
        """The payload as `kvpack.kernels.lookup` reads it; None where its codes are not looked up."""
        return None

    def gridded(self, x: Tensor) -> GridCodec | None:
        """This codec with everything fixed that spans whole rows of `x` [..., T, D]; None if it has no grid.

        What is left are grids of groups of channels, which solvers fit and fill one after another.
        """
        return None

    def lowering(self, coarser: Codec) -> Callable[[Payload], Payload] | None:
        """What turns payloads of this codec into those of `coarser`, from the codes alone; None without.

        Encoding and then lowering equals encoding with `coarser`, up to the rounding of scales.
        """
        return None


class GridCodec(Codec):
    """A codec whose codes lie on a grid that can be fixed before the codes are chosen.

    Solvers need this: they choose each code knowing the rounding errors of the others.
    """

    def gridded(self, x: Tensor) -> GridCodec | None:
        """Itself: nothing spans more than a group."""
        return self

    @abstractmethod
    def group_size(self, channels: int) -> int:
        """Channels that share one grid entry, for a last axis of `channels`."""

    @abstractmethod
    def grid(self, x: Tensor, valid: Tensor | None = None) -> State:
        """Fit the grid to `x` [..., T, D]: tensors with one entry per group."""

    @abstractmethod
    def snap(self, x: Tensor, grid: State) -> Tensor:
        """Nearest codes of `x` on `grid`, uint8, same shape as `x`."""

    @abstractmethod
    def value(self, codes: Tensor, grid: State) -> Tensor:
        """The numbers that `codes` stand for, float32."""

    def even(self, grid: State) -> EvenGrid | None:
        """The grid of one group of channels as steps and offsets; None where it is not so simple."""
        return None

    @abstractmethod
    def assemble(self, codes: Tensor, grid: State) -> Payload:
        """Pack chosen codes and their grid into a payload."""


class MaskedCodec(Codec):
    """A codec that keeps `keep` of every `of` neighbouring channels and leaves these to another codec.

    Where `of` does not divide the channels, the last few are filled up with zeros.
    """

    keep: int
    of: int

    @property
    @abstractmethod
    def survivors(self) -> Codec:
        """The codec of what is kept, `keep` channels for every `of`."""

    @abstractmethod
    def join(self, kept: Tensor, payload: Payload) -> Payload:
        """The payload of all channels.

        Args:
            kept: which channels are, bool [..., T, D filled up]; exactly `keep` of every `of`.
            payload: what `survivors` made of those, in order [..., T, D filled up * keep / of].
        """


class ClassedCodec(Codec):
    """A codec that divides channels into classes by importance and codes each on grids of its own."""

    @abstractmethod
    def classes(self, channels: int) -> tuple[tuple[int, GridCodec], ...]:
        """Channels of each class and their codec, in stored order; `channels` together."""

    @abstractmethod
    def rank(self, salience: Tensor) -> State:
        """The state in which the channels are divided by `salience` [C], higher matters more."""

    @abstractmethod
    def order(self, state: State, channels: int) -> Tensor:
        """The channels in stored order, int64 [C]."""

    @abstractmethod
    def join(self, payloads: Sequence[Payload]) -> Payload:
        """The payload of all channels, from those of the classes."""


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
