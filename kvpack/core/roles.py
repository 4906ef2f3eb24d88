"""The roles: the questions that a published method answers, one small interface each.

A part is a frozen dataclass of hyper-parameters (its configuration goes to the manifest). What it
learns is a `State` (it goes to safetensors). The two never mix, and no part owns a hook, a random
number generator or another part's file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpack.core.types import CacheView, Payload, Shape, Site, Stat, State, Stats, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Plane = Literal["key", "value"]


class Part:
    """What all parts share: they may ask for statistics and turn them into state."""

    def requires(self) -> frozenset[Stat]:
        """Statistics that `fit` needs; none by default."""
        return frozenset()

    def fit(self, stats: Stats) -> State:
        """Turn the statistics of one layer into this part's state for it."""
        return {}

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Shapes of the state that `fit` returns for an input [..., K, T, D]; empty by default."""
        return {}


class Transform(Part, ABC):
    """A change of basis in which the channels are easier to compress.

    Laws, held by the contract tests: ``inverse(forward(x)) == x``, and where `dual` is not None
    ``<dual(q), forward(k)> == <q, k>`` per head. Inputs are [B, K, T, D]; the output may merge
    heads into wider ones ([B, K/g, T, g*D]) but keeps B and T.
    """

    linear: ClassVar[bool] = True
    """Linear in `x` and independent of the token, so that it can be folded into projections."""

    needs_rope: ClassVar[bool] = False
    """Whether `forward` reads `Site.rope` and `Site.positions`."""

    def shape(self, shape: Shape) -> Shape:
        """Shape of `forward`'s output for an input of `shape`; unchanged by default."""
        return shape

    @abstractmethod
    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Into the compressible basis. Computes in float32."""

    @abstractmethod
    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Back to the model's basis. Computes in float32; the input's head layout is restored."""

    def dual(self, q: Tensor, state: State, at: Site) -> Tensor | None:
        """The query-side partner of `forward`, or None when there is none."""
        return None


class Codec(Part, ABC):
    """An approximation of a block of numbers [..., T, D] by fewer bytes.

    Every payload tensor keeps its token axis at -2 with a fixed number of rows per token block,
    so that encoding blocks one after another and concatenating equals encoding them together.
    That is what makes a cache append-only.
    """

    @property
    def token_block(self) -> int:
        """Tokens that must be encoded together; 1 when each token stands alone."""
        return 1

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


class GridCodec(Codec):
    """A codec whose codes lie on a grid that can be fixed before the codes are chosen.

    Solvers need this: they choose each code knowing the rounding errors of the others.
    """

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

    @abstractmethod
    def assemble(self, codes: Tensor, grid: State) -> Payload:
        """Pack chosen codes and their grid into a payload."""


class TierPolicy(Part, ABC):
    """Which tokens stay exact, and when the others are encoded.

    Two tiers carry the names `inside` (exact) and `outside` (encoded). Decisions look only at the
    exact tail, so that cropping and beam search need no special cases.
    """

    inside: str
    outside: str

    needs_hidden: ClassVar[bool] = False
    """Whether `protect` reads `CacheView.hidden`."""

    @abstractmethod
    def leaving(self, tail_tokens: int, block: int, plane: Plane) -> int:
        """How many of the oldest `tail_tokens` exact tokens are encoded now.

        `block` is the codec's token block; the answer is a multiple of it.
        """

    @abstractmethod
    def protect(self, view: CacheView) -> Tensor | None:
        """Tokens of this update that stay exact for good, bool [B, T]; None when none do."""

    @abstractmethod
    def protected_tokens(self) -> int:
        """The most tokens per row that `protect` keeps from a prompt given in one piece."""


class Solver(Part, ABC):
    """How the codes of a weight are chosen."""

    @abstractmethod
    def solve(self, weight: Tensor, codec: Codec, stats: Stats) -> Payload:
        """Encode `weight` [R, C] with `codec`, knowing statistics of the layer's input."""


ROLES: dict[str, type[Part]] = {
    "transforms": Transform,
    "codecs": Codec,
    "policies": TierPolicy,
    "solvers": Solver,
}
"""Folder under `kvpack/parts/` -> the class its parts extend."""
