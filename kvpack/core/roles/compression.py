"""Roles that answer how numbers become fewer bytes: transforms and codecs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from kvpack.core.errors import RecipeError
from kvpack.core.roles.part import Part
from kvpack.core.rows import Step, TokenRows
from kvpack.core.types import CodedRows, EvenGrid, Payload, Shape, Site, State, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Transform(Part, ABC):
    """A change of basis in which the channels are easier to compress.

    Laws, held by the contract tests: ``inverse(forward(x)) == x``, and where `dual` is not None
    ``<dual(q), forward(k)> == <q, k>`` per head. Inputs are [B, K, T, D]; the output may merge
    heads into wider ones ([B, K/g, T, g*D]) but keeps B and T.
    """

    linear: ClassVar[bool] = True
    """Linear in `x` and independent of the token, so that it can be folded into projections."""

    commutes_with_rope: ClassVar[bool] = False
    """``forward`` and `dual` may run before RoPE as well as after it, so that keys can be folded too."""

    needs_rope: ClassVar[bool] = False
    """Whether `forward` reads `Site.rope` and `Site.positions`."""

    diagonal: ClassVar[bool] = False
    """``forward`` multiplies every channel by a factor of its own."""

    permutes: ClassVar[bool] = False
    """``forward`` only puts channels in another order."""

    orthonormal: ClassVar[bool] = False
    """``forward`` multiplies by an orthonormal matrix, at least within one head."""

    fits_prompt: ClassVar[bool] = False
    """Whether a cache makes this transform's state from its first tokens, see `fit_prompt`."""

    def fit_prompt(self, x: Tensor, queries: Tensor, valid: Tensor | None, rows: Tensor | None) -> State:
        """State of one cache, from the tokens it is given first; it is frozen from then on.

        Args:
            x: what `forward` will be given [B, K, T, D].
            queries: the queries of the same tokens in the same basis [B, K, G*T, D], one kv head's
                query heads one after another.
            valid: tokens of `x` that are not padding [B, T]; None when all are.
            rows: the same for `queries` [B, G*T].

        Returns:
            Tensors with the batch axis first. Until there are any, `forward` must change nothing.
        """
        return {}

    def prompt_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Shapes of what `fit_prompt` returns for an `x` of `shape`; empty by default."""
        return {}

    def shape(self, shape: Shape) -> Shape:
        """Shape of `forward`'s output for an input of `shape`; unchanged by default."""
        return shape

    def for_codec(self, codec: Codec | None) -> Transform:
        """This transform, knowing which codec the weights in its basis will get; itself by default.

        None where none of them is packed.
        """
        return self

    in_rows: ClassVar[bool] = False
    """``inverse`` works on every token alone, with its heads side by side, by the steps of `row_steps`."""

    def row_steps(self, state: State, at: Site, channels: int) -> tuple[Step, ...]:
        """What `inverse` does to a row, for an input of `forward` with heads of `channels` channels."""
        raise NotImplementedError(f"{type(self).__name__} does not work in rows")

    @abstractmethod
    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Into the compressible basis. Computes in float32."""

    @abstractmethod
    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Back to the model's basis. Computes in float32; the input's head layout is restored."""

    def dual(self, q: Tensor, state: State, at: Site) -> Tensor | None:
        """The query-side partner of `forward`, or None when there is none."""
        return None

    def gradient(self, g: Tensor, state: State, at: Site) -> Tensor:
        """Gradients with respect to `forward`'s input [B, K, T, D] -> with respect to its output.

        The chain rule makes this the transposed inverse, which is what `dual` is.

        Raises:
            RecipeError: the transform cannot map gradients.
        """
        partner = self.dual(g, state, at)
        if partner is None:
            raise RecipeError(
                f"transform {type(self).__name__} cannot map gradients",
                why="a part after it wants the gradients in its basis",
            )
        return partner

    def query(self, q: Tensor, state: State, at: Site) -> Tensor:
        """Queries [B, K, T, D] in this basis, for scores that may be approximate: `dual` by default.

        Raises:
            RecipeError: the transform has no query side.
        """
        partner = self.dual(q, state, at)
        if partner is None:
            raise RecipeError(
                f"transform {type(self).__name__} has no query side",
                why="a part after it wants to know the queries in its basis",
            )
        return partner


class DiagonalTransform(Transform):
    """z = x / s with a factor s per channel; what reads x is multiplied by s.

    A subclass says how s is found (`fit`). State: "factor" float32 [K, D].
    """

    diagonal: ClassVar[bool] = True

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """One factor per channel."""
        return {"factor": TensorSpec((shape[-3], shape[-1]), "float32")}

    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Divide."""
        return x.float() / state["factor"].unsqueeze(-2)

    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Multiply."""
        return z.float() * state["factor"].unsqueeze(-2)

    def dual(self, q: Tensor, state: State, at: Site) -> Tensor:
        """Multiply; `q` may have several heads per kv head."""
        repeat = q.shape[1] // state["factor"].shape[0]
        return q.float() * state["factor"].repeat_interleave(repeat, 0).unsqueeze(-2)


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
        """Whether compiled loops can decode the tokens one after another, from `token_rows`."""
        return False

    def token_rows(self, payload: Payload, state: State) -> TokenRows:
        """The payload as compiled loops read it; see `in_rows`."""
        raise NotImplementedError(f"{type(self).__name__} does not work in rows")

    def coded_rows(self, payload: Payload, state: State) -> CodedRows | None:
        """The payload as `kvpack.kernels.lookup` reads it; None where its codes are not looked up."""
        return None

    def gridded(self, x: Tensor) -> GridCodec | None:
        """This codec with everything fixed that spans whole rows of `x` [..., T, D]; None if it has no grid.

        What is left are grids of groups of channels, which solvers fit and fill one after another.
        """
        return None

    def nests(self, coarser: Codec) -> bool:
        """Whether `lower` turns this codec's payloads into those of `coarser`."""
        return False

    def lower(self, payload: Payload, coarser: Codec) -> Payload:
        """The payload of `coarser`, from the codes alone; only where `nests` says so.

        Encoding and then lowering equals encoding with `coarser`, up to the rounding of scales.
        """
        raise ValueError(f"{type(self).__name__} does not nest {type(coarser).__name__}")


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
