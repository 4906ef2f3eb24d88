"""The few data types that travel between layers. No torch at import time.

Shape letters, fixed everywhere: B batch, H query heads, K kv heads, T tokens, D head_dim,
C channels, L layers, G group size, R rows of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from kvpack.core.errors import KvpackError

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
"""What a part learned from calibration, by name. Stored as safetensors, never as Python."""

Shape = tuple[int, ...]

ITEM_BYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}
"""Bytes of one element, by torch dtype name."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that does not exist yet.

    `dtype` is a torch dtype name such as ``"uint8"``, so that planning needs no torch.
    """

    shape: Shape
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Payload:
    """An encoded block of numbers: immutable, and complete for its size.

    `tensors` holds everything a reader needs besides the part's configuration and state:
    codes, scales, zeros, outliers, indices. `shape` is the logical shape that was encoded.
    """

    tensors: Mapping[str, Tensor]
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors: what effective bits are counted from."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def rows(self, start: int, stop: int) -> Payload:
        """The part that stands for the tokens (or weight rows) `start` to `stop`, whole blocks only."""
        count = self.shape[-2]
        tensors = {}
        for name, tensor in self.tensors.items():
            first, last = (at * tensor.shape[-2] // count for at in (start, stop))
            tensors[name] = tensor.narrow(-2, first, last - first)
        return Payload(tensors, (*self.shape[:-2], stop - start, self.shape[-1]))

    def blocks(self, places: Tensor, size: int) -> Payload:
        """The blocks of `size` tokens (or weight rows) at `places` [N], one after another."""
        count = self.shape[-2] // size
        tensors = {}
        for name, tensor in self.tensors.items():
            rows = tensor.shape[-2] // count
            apart = tensor.reshape(*tensor.shape[:-2], count, rows, tensor.shape[-1])
            tensors[name] = apart.index_select(-3, places).flatten(-3, -2)
        return Payload(tensors, (*self.shape[:-2], len(places) * size, self.shape[-1]))

    @property
    def bits_per_element(self) -> float:
        """Stored bits divided by logical elements."""
        return 8 * self.nbytes / math.prod(self.shape)


class CodedRows(NamedTuple):
    """Rows [..., T, D] of codes that are looked up, as compiled loops read them.

    `codes` uint8 [..., T, bytes] are bit streams. A row stores `width` numbers, one entry of `first` and
    `second` [..., T, ceil(width/group)] for every `group` of them. `kind` tells what codes stand for:

    - "even": integers on an affine grid, `first` its steps, `second` its zeros (None where symmetric).
    - "mirrored": ``{-b, -a, a, b}``, a in `first` and b in `second`.
    - "vectors": places in a codebook `second` float32 [groups, 2^bits, size], times a factor in `first`.

    Where `of` is not 1, only `keep` of every `of` numbers are stored, the others are zero: `mask` uint8
    [..., T, bytes] holds the numbers of the patterns (`kvpack.ops.masks`).
    """

    kind: str
    codes: Tensor
    bits: int
    width: int
    group: int
    first: Tensor
    second: Tensor | None
    channels: int
    mask: Tensor | None = None
    keep: int = 1
    of: int = 1


class EvenGrid(NamedTuple):
    """A grid of evenly spaced numbers, one per row of one group, as compiled loops read it.

    `step` and `offset` float32 [R, 1]; codes are 0 to `levels`. A code stands for ``code * step +
    offset``, or, where `centred`, for ``(code - offset) * step``.
    """

    step: Tensor
    offset: Tensor
    levels: int
    centred: bool


@dataclass(frozen=True)
class Solution:
    """A weight's codes, and what its codec had to learn for this one weight, such as a codebook."""

    payload: Payload
    state: State = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by name."""
        return {**self.payload.tensors, **self.state}


Stream = Literal["input", "gradient", "query", "projection", "rope", "consumers", "factor", "output_gradient"]
"""What a statistic is measured on, see `Stat`."""


@dataclass(frozen=True)
class Stat:
    """A statistic that a part needs from calibration.

    `kind` names an accumulator of `kvpack.calibrate.stats` ("gram", "channel_sum", ...). Where it
    is collected follows from the part's place: a solver's on the input of its linear layer, a
    transform's or codec's on the tensor it would receive. `of` tells what is measured there:

    - "input": that tensor.
    - "gradient": the gradient of the language-model loss with respect to it, token for token.
    - "query": the queries that will read it, brought to the same basis by `Transform.query`;
      the query heads of one kv head follow each other along the token axis, [B, K, G*T, D].
    - "projection": with kind "weight", the rows of the projection that makes this plane:
      "weight" [K*D, C] and, where there is one, "bias" [K*D]; "heads" is K.
    - "rope": with kind "partner", the channel that RoPE turns each channel with: "partner"
      int64 [D], a channel's own number where it is not turned.
    - "consumers": with kind "weight", the weights of all linear layers that are given the same
      tensor, one below the other: "weight" float32 [R, C]; for a transform [K, R, D], heads apart.
    - "factor": what every channel is multiplied with before a linear layer reads it, such as the up
      projection of an FFN [B, 1, T, C]; absent where there is no such thing.
    - "output_gradient": the gradient of the loss of a sample's tokens, summed, with respect to what
      the linear layer gives [B, 1, T, R]. Only allocators get it.
    """

    kind: str
    of: Stream = "input"

    @property
    def name(self) -> str:
        """Key of the finished statistic: "rows", "gradient.rows", ..."""
        return self.kind if self.of == "input" else f"{self.of}.{self.kind}"


Stats = Mapping[str, "Mapping[str, Tensor]"]
"""Finished statistics, by `Stat.name`: the accumulator's `state()`."""


class Rope(Protocol):
    """Rotary position embedding of one layer, as the model applies it."""

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` [B, K, T, D] to `positions` [B or 1, T]."""

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Invert `apply`; computed and returned in float32."""

    def partners(self, channels: int) -> Tensor:
        """The channel that each of `channels` is turned with, int64 [D]; itself where it is not turned."""


@dataclass(frozen=True)
class Site:
    """Where a transform runs: the layer, and what is known of the tokens in its input.

    `kv_heads` is K of the transform's own input; one that merged heads reads it to restore them.
    """

    layer: int
    rope: Rope | None = None
    positions: Tensor | None = None
    kv_heads: int = 0

    def rotary(self, kind: str) -> tuple[Rope, Tensor]:
        """The rotary embedding and the positions, for a transform of this `kind`.

        Raises:
            KvpackError: the layer has none.
        """
        if self.rope is None or self.positions is None:
            raise KvpackError(
                f"layer {self.layer}: {kind} got no rotary embedding or no positions",
                hint=f"use {kind} on keys of a model with rotary position embeddings",
            )
        return self.rope, self.positions


@dataclass(frozen=True)
class CacheView:
    """The tokens of one cache update, as a policy sees them.

    `hidden` is the decoder layer's input [B, T, C] (None unless the policy asks for it),
    `valid` marks tokens that are not padding [B, T] (None: all are), `seen` counts the valid
    tokens of each row that came before [B]. `memory` holds tensors [B, ...] that a policy wants to
    find again at the layer's next update; it may add to it and replace entries.
    """

    layer: int
    batch: int
    tokens: int
    seen: Tensor
    valid: Tensor | None = None
    hidden: Tensor | None = None
    memory: State = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreView:
    """One forward pass of a layer, as a scorer sees it: T new tokens, S that they may attend to.

    `valid` marks new tokens that are not padding [B, T] (None: all are). A scorer that needs
    queries gets `query` [B, H, T, D] and `key` [B, K, S, D] as attention does, `visible` (bool
    [B or 1, 1 or H, T, S], None for plain causal attention) and the `scaling` of the scores. One
    that needs embeddings gets the model's input `embeddings` [B, T, C] and, where the caller told
    them, which tokens are `text` [B, T].
    """

    layer: int
    valid: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    visible: Tensor | None = None
    scaling: float = 1.0
    embeddings: Tensor | None = None
    text: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """Numbers that share one scale: `size` neighbours along `axis`.

    "channel" is the last axis, "token" the one before it (the rows of a weight). A size of 0
    means the whole axis. A last group may be smaller than `size` on the channel axis.
    """

    axis: str = field(default="channel", metadata={"choices": ("channel", "token")})
    size: int = field(default=128, metadata={"minimum": 0})
