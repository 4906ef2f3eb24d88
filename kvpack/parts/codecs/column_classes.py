"""Channels in classes of importance: the important ones get more bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import chain, repeat
from typing import TYPE_CHECKING, cast

from kvpack import ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.lazy import torch
from kvpack.core.roles import ClassedCodec, Codec, GridCodec
from kvpack.core.types import Payload, Shape, Stat, State, Stats, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

STEP = 8
"""Classes hold a multiple of this many channels, so that their codes fill whole bytes."""
FEWEST = 64
"""Rows of fewer channels are not divided: grids of their own would cost more than they give."""


@dataclass(frozen=True)
class ColumnClasses(ClassedCodec):
    """Codes channels in three classes, of `bits` + 1, `bits` and `bits` - 1 bits.

    The `salient_fraction` of the channels that matter most are the first class, the
    `other_fraction` that matter least the last. Both are rounded to a multiple of 8, and to 8 at
    least unless they are 0. The last class is left out where its grids would cost more than its
    codes save: below some 1000 channels, at 2.5 %. One bit would be too few: 2 bits mean 4 bits for
    the salient channels, 3 for the `other_fraction` after them, and 2 for the rest. No class has more
    than 8 bits. Fewer than 64 channels are one class.

    Each class is coded by `codec` with its own bits (those given there do not matter), and in its own
    groups, which never span two classes. The classes lie one after the other, and a class keeps the
    order of its channels; `decode` puts every channel back into its place.

    Payload: that of `codec`, the tensors of the classes side by side. State: "classes" uint8
    [ceil(D/4)], the class of every channel in 2 bits, 0 for the first; none where there is one class.
    The state comes from the solver of a weight; a cache ranks channels by their energy, sum x^2 over
    all heads. Source: MLWQ, EMNLP 2025, section 3.3.

    Raises:
        RecipeError: a codec without bits or without grids of channels.
    """

    codec: Codec
    bits: int = field(default=3, metadata={"minimum": 2, "maximum": 8})
    salient_fraction: float = field(default=0.025, metadata={"minimum": 0.0, "maximum": 0.5})
    other_fraction: float = field(default=0.025, metadata={"minimum": 0.0, "maximum": 0.5})

    def __post_init__(self) -> None:
        fitting = isinstance(self.codec, GridCodec) and self.codec.token_block == 1
        settings = fields(self.codec) if fitting else ()  # type: ignore[arg-type]  # parts are dataclasses
        if "bits" not in {setting.name for setting in settings}:
            raise RecipeError(
                f"codec {type(self.codec).__name__} as configured cannot code classes of channels",
                why="each class has its own bits and its own groups of channels",
                hint="use codec: {kind: affine, group: {size: 128}, zero: integer}",
            )

    def classes(self, channels: int) -> tuple[tuple[int, GridCodec], ...]:
        """Channels of each class and their codec, in stored order."""
        salient = self._count(self.salient_fraction, channels)
        other = min(self._count(self.other_fraction, channels), channels - salient)
        rest = channels - salient - other
        if self.bits == 2:
            return self._divided((salient, 4), (other, 3), (rest, 2))
        first = (salient, min(self.bits + 1, 8))
        three = self._divided(first, (rest, self.bits), (other, self.bits - 1))
        two = self._divided(first, (rest + other, self.bits))
        return three if _row_bytes(three) < _row_bytes(two) else two

    def rank(self, salience: Tensor) -> State:
        """Divide channels by `salience` [D], ties in their original order.

        Raises:
            KvpackError: it is not finite.
        """
        if not bool(salience.isfinite().all()):
            raise KvpackError(
                "the salience of the channels is not finite",
                hint="calibrate again with sound text and weights",
            )
        sizes = [count for count, _ in self.classes(len(salience))]
        if len(sizes) == 1:
            return {}
        numbers = torch.tensor(list(chain(*(repeat(i, n) for i, n in enumerate(sizes)))), dtype=torch.uint8)
        classes = torch.empty_like(numbers, device=salience.device)
        classes[salience.argsort(descending=True, stable=True)] = numbers.to(salience.device)
        return {"classes": ops.bits.pack(classes, 2)}

    def order(self, state: State, channels: int) -> Tensor:
        """Channels in stored order, int64 [D]."""
        if "classes" not in state:
            return torch.arange(channels)
        return ops.channel_order.stored(state["classes"], channels)

    def join(self, payloads: Sequence[Payload]) -> Payload:
        """Lay the payloads of the classes side by side."""
        names = payloads[0].tensors
        *outer, _ = payloads[0].shape
        tensors = {name: torch.cat([p.tensors[name] for p in payloads], -1) for name in names}
        return Payload(tensors, (*outer, sum(p.shape[-1] for p in payloads)))

    def requires(self) -> frozenset[Stat]:
        """The Gram matrix of the channels."""
        return frozenset({Stat("gram")})

    def fit(self, stats: Stats) -> State:
        """Rank channels by their energy."""
        return self.rank(stats["gram"]["gram"].diagonal())

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Two bits per channel, where there are classes."""
        several = len(self.classes(shape[-1])) > 1
        return {"classes": TensorSpec((-(-shape[-1] // 4),), "uint8")} if several else {}

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """The payloads of the classes side by side."""
        *outer, channels = shape
        parts = [codec.spec((*outer, count), dtype) for count, codec in self.classes(channels)]
        return {
            name: TensorSpec((*first.shape[:-1], sum(p[name].shape[-1] for p in parts)), first.dtype)
            for name, first in parts[0].items()
        }

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Sort the channels of `x` and encode every class."""
        classes = self.classes(x.shape[-1])
        ordered = x[..., self.order(state, x.shape[-1]).to(x.device)]
        parts = torch.split(ordered, [count for count, _ in classes], -1)
        return self.join([codec.encode(p, {}, valid) for p, (_, codec) in zip(parts, classes, strict=True)])

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """Decode every class and put the channels back into their places."""
        parts = [codec.decode(part, {}, dtype) for codec, part in self._parts(payload)]
        return self._placed(parts, state)

    @property
    def reads_codes(self) -> bool:
        """Whether `codec` does."""
        return self.codec.reads_codes

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """Products with the classes, one after another."""
        if "classes" in state:
            order = ops.channel_order.stored(state["classes"], payload.shape[-1])
            query = query.index_select(-1, order.to(query.device))
        parts = self._parts(payload)
        queries = torch.split(query, [part.shape[-1] for _, part in parts], -1)
        found = [codec.scores(q, part, {}) for q, (codec, part) in zip(queries, parts, strict=True)]
        return sum(found[1:], found[0])

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """Sums of the classes, put back into their places."""
        return self._placed([codec.mix(weights, part, {}) for codec, part in self._parts(payload)], state)

    def _parts(self, payload: Payload) -> list[tuple[GridCodec, Payload]]:
        """The classes' codecs and payloads, which are views."""
        *outer, channels = payload.shape
        found = []
        for codec, count, places in _layout(self, channels):
            tensors = {name: payload.tensors[name].narrow(-1, *place) for name, place in places}
            found.append((codec, Payload(tensors, (*outer, count))))
        return found

    def _placed(self, parts: Sequence[Tensor], state: State) -> Tensor:
        """Channels of the classes [..., n] in their own places [..., D]."""
        together = torch.cat(list(parts), -1)
        if "classes" not in state:
            return together
        places = ops.channel_order.places(state["classes"], together.shape[-1])
        return together.index_select(-1, places.to(together.device))

    def _divided(self, *sizes: tuple[int, int]) -> tuple[tuple[int, GridCodec], ...]:
        """`codec` with the bits of each class that has channels."""
        return tuple(
            (count, cast(GridCodec, replace(self.codec, bits=bits)))  # type: ignore[type-var]  # parts are dataclasses
            for count, bits in sizes
            if count
        )

    def _count(self, fraction: float, channels: int) -> int:
        if not fraction or channels < FEWEST:
            return 0
        return max(STEP, round(fraction * channels / STEP) * STEP)


def _row_bytes(classes: Sequence[tuple[int, GridCodec]]) -> int:
    """Stored bytes of one row."""
    return sum(spec.nbytes for count, codec in classes for spec in codec.spec((1, count)).values())


@lru_cache(maxsize=256)
def _layout(
    codec: ColumnClasses, channels: int
) -> tuple[tuple[GridCodec, int, tuple[tuple[str, tuple[int, int]], ...]], ...]:
    """Codec and channels of every class, and where its part of each payload tensor starts, how long it is."""
    found, used = [], dict[str, int]()
    for count, own in codec.classes(channels):
        places = []
        for name, spec in own.spec((1, count)).items():
            places.append((name, (used.get(name, 0), spec.shape[-1])))
            used[name] = used.get(name, 0) + spec.shape[-1]
        found.append((own, count, tuple(places)))
    return tuple(found)
