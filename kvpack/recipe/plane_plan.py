"""The plan of one plane of a cache, keys or values: transforms, codecs, and the bytes they store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvpack.core.roles import Codec, Part, Plane, RowTransform, Transform
from kvpack.core.types import Shape, TensorSpec


@dataclass(frozen=True)
class PlanePlan:
    """Keys or values of one layer: transforms, whether they are folded, and a codec per coded tier.

    `states` are the tensors that each transform, and then each codec, learns from calibration.
    """

    transforms: tuple[Transform, ...]
    folded: bool
    codecs: tuple[Codec, ...]
    states: tuple[Mapping[str, TensorSpec], ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Transforms and codecs: tokens pass the transforms in order and then one of the codecs."""
        return (*self.transforms, *self.codecs)

    @property
    def block(self) -> int:
        """Tokens that leave the exact tail, and change tiers, together."""
        return math.lcm(*(codec.token_block for codec in self.codecs))

    @property
    def online(self) -> tuple[Transform, ...]:
        """Transforms that run at inference time."""
        return () if self.folded else self.transforms

    def online_states(self) -> dict[int, Mapping[str, TensorSpec]]:
        """States that are needed at inference time, by the part's place in the chain."""
        first = len(self.transforms) if self.folded else 0
        return {i: self.states[i] for i in range(first, len(self.parts))}

    def stored_states(self) -> dict[int, Mapping[str, TensorSpec]]:
        """States that artifacts hold: those needed online, and what folded transforms have learned.

        The latter let an artifact be proven against its source without the calibration.
        """
        learned = (i for i, t in enumerate(self.transforms) if self.folded and t.requires())
        return {i: self.states[i] for i in learned} | self.online_states()

    def obstacle(self, plane: Plane, shape: Shape) -> str:
        """Why a plane of `shape` [B, K, T, D] must be decoded to be read; empty where it need not."""
        for transform in self.online:
            kind = type(transform).__name__
            if tuple(transform.shape(shape)) != tuple(shape):
                return f"{kind} mixes heads"
            if plane == "value" and not transform.linear:
                return f"{kind} depends on the token"
            if plane == "key" and type(transform).dual is Transform.dual:
                return f"{kind} has no partner for queries"
        slow = next((codec for codec in self.codecs if not codec.reads_codes), None)
        return "" if slow is None else f"{type(slow).__name__} codes are decoded"

    @property
    def in_rows(self) -> bool:
        """Whether what is stored can be brought back to the model's basis token by token, see `Reading`."""
        return all(isinstance(t, RowTransform) for t in self.online) and all(c.in_rows for c in self.codecs)

    def coded_shape(self, shape: Shape) -> Shape:
        """Shape [B, K', T, D'] that the codecs see for a plane of `shape` [B, K, T, D]."""
        for transform in self.online:
            shape = transform.shape(shape)
        return shape

    def fitted_nbytes(self, shape: Shape) -> int:
        """Bytes of the states that online transforms make from a cache's first tokens."""
        total = 0
        for transform in self.online:
            total += sum(spec.nbytes for spec in transform.prompt_spec(shape).values())
            shape = transform.shape(shape)
        return total

    def coded_nbytes(self, shape: Shape, tokens: Sequence[int], dtype: str) -> int:
        """Stored bytes of `tokens` tokens per tier, encoded in one piece.

        Args:
            shape: of the plane, [B, K, any, D].
            tokens: per coded tier.
            dtype: of the plane, a torch dtype name.
        """
        total = 0
        for codec, count in zip(self.codecs, tokens, strict=True):
            for length in segments(codec, count):
                # A last token block that the tokens do not fill is filled up.
                whole = -(-length // codec.token_block) * codec.token_block
                coded = self.coded_shape((*shape[:2], whole, shape[3]))
                total += sum(spec.nbytes for spec in codec.spec(coded, dtype).values())
        return total


def segments(codec: Codec, tokens: int) -> Iterator[int]:
    """Lengths of the segments in which a codec encodes `tokens` tokens; one where it needs none."""
    most = codec.segment // codec.token_block * codec.token_block or tokens
    while tokens:
        length = min(most, tokens)
        yield length
        tokens -= length
