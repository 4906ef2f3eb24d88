"""The plan: a recipe applied to one model, every tensor and every byte accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvpack.core.model_spec import AttentionSpec, LinearSpec, ModelSpec
from kvpack.core.roles import Codec, Part, Plane, Solver, TierPolicy, Transform
from kvpack.core.types import Shape, TensorSpec
from kvpack.recipe.recipe import LoadedRecipe

PLANES: tuple[Plane, ...] = ("key", "value")
"""The two sides of a cache, in the order in which they are handled everywhere."""


@dataclass(frozen=True)
class WeightPlan:
    """A linear layer that is packed: by which parts, into which tensors."""

    linear: LinearSpec
    rule: int
    codec: Codec
    solver: Solver
    tensors: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(frozen=True)
class DroppedTensor:
    """A checkpoint tensor that the artifact does not hold, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class PlanePlan:
    """Keys or values of one layer: transforms, whether they are folded, and the codec.

    `states` are the tensors that each transform, and last the codec, learns from calibration.
    """

    transforms: tuple[Transform, ...]
    folded: bool
    codec: Codec
    states: tuple[Mapping[str, TensorSpec], ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Transforms and codec, in the order in which tokens pass them."""
        return (*self.transforms, self.codec)

    @property
    def online(self) -> tuple[Transform, ...]:
        """Transforms that run at inference time."""
        return () if self.folded else self.transforms

    def online_states(self) -> dict[int, Mapping[str, TensorSpec]]:
        """States that are needed at inference time, by the part's place in the chain."""
        first = len(self.transforms) if self.folded else 0
        return {i: self.states[i] for i in range(first, len(self.parts))}

    def coded_shape(self, shape: Shape) -> Shape:
        """Shape [B, K', T, D'] that the codec sees for a plane of `shape` [B, K, T, D]."""
        for transform in self.online:
            shape = transform.shape(shape)
        return shape


@dataclass(frozen=True)
class KVLayerPlan:
    """The cache of one attention layer."""

    attention: AttentionSpec
    key: PlanePlan
    value: PlanePlan
    policy: TierPolicy

    def plane(self, plane: Plane) -> PlanePlan:
        """The key or the value side."""
        return self.key if plane == "key" else self.value

    def held_tokens(self, tokens: int, plane: Plane) -> tuple[int, int]:
        """Encoded and exact tokens of a plane after a prompt of `tokens` given in one piece.

        A sliding layer gives up whole token blocks that no later token can see.
        """
        block = self.plane(plane).codec.token_block
        left = self.policy.leaving(tokens, block, plane)
        needed = 0 if self.attention.window is None else max(0, tokens - self.attention.window + 1)
        first = needed // block * block
        return max(0, left - first), tokens - max(left, first)

    def visible_tokens(self, tokens: int) -> int:
        """Tokens that the next token attends to."""
        window = self.attention.window
        return tokens if window is None else min(tokens, window - 1)


@dataclass(frozen=True)
class Plan:
    """Everything an export will do, before it does anything."""

    recipe: LoadedRecipe
    model: ModelSpec
    weights: Mapping[str, WeightPlan]
    copied: Mapping[str, TensorSpec]
    dropped: tuple[DroppedTensor, ...]
    kv: tuple[KVLayerPlan, ...]

    def artifact_tensors(self) -> dict[str, TensorSpec]:
        """Every weight tensor of the artifact, by name, in the order it is written.

        The order is by decoder block, then by name, so that a block can be read, packed, written
        and freed before the next one.
        """
        tensors = dict(self.copied)
        for name, weight in self.weights.items():
            tensors.update({f"{name}.{part}": spec for part, spec in weight.tensors.items()})
        first = len(self.model.blocks)

        def order(name: str) -> tuple[int, str]:
            block = self.model.block_of(name)
            return (first if block is None else block, name)

        return {name: tensors[name] for name in sorted(tensors, key=order)}

    def kv_state_tensors(self) -> dict[str, TensorSpec]:
        """State of the KV parts: ``layers.<l>.<plane>.<i>.<name>``; folded transforms hold none."""
        tensors: dict[str, TensorSpec] = {}
        for layer in self.kv:
            for plane in PLANES:
                for i, state in layer.plane(plane).online_states().items():
                    tensors.update(
                        {state_name(layer.attention.layer, plane, i, n): s for n, s in state.items()}
                    )
        return tensors


def state_name(layer: int, plane: str, index: int, name: str) -> str:
    """Name of a KV part's state in calibrations and artifacts; `index` is its place in the chain."""
    return f"layers.{layer}.{plane}.{index}.{name}"
