"""The plan: a recipe applied to one model, every tensor and every byte accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvpack.core.model_spec import AttentionSpec, LinearSpec, ModelSpec
from kvpack.core.roles import Codec, Plane, Solver, TierPolicy, Transform
from kvpack.core.types import Shape, TensorSpec
from kvpack.recipe.recipe import LoadedRecipe


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
    """Keys or values of one layer: transforms, whether they are folded, and the codec."""

    transforms: tuple[Transform, ...]
    folded: bool
    codec: Codec
    states: tuple[Mapping[str, TensorSpec], ...]

    @property
    def online(self) -> tuple[Transform, ...]:
        """Transforms that run at inference time."""
        return () if self.folded else self.transforms

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

    def stored_tokens(self, tokens: int, plane: Plane) -> int:
        """Tokens of a prompt of `tokens`, given in one piece, that are encoded."""
        return self.policy.leaving(tokens, self.plane(plane).codec.token_block, plane)

    def nbytes(self, tokens: int, batch: int = 1, dtype: str = "bfloat16") -> int:
        """Bytes held after a prompt of `tokens`: codes, scales and the exact tail.

        Protected tokens and positions come on top (`report.kv_bytes` adds them).
        """
        total = 0
        shape = (batch, self.attention.kv_heads, tokens, self.attention.head_dim)
        for name in ("key", "value"):
            plane: Plane = "key" if name == "key" else "value"
            stored = self.stored_tokens(tokens, plane)
            coded = self.plane(plane).coded_shape((*shape[:2], stored, shape[3]))
            if stored:
                total += sum(t.nbytes for t in self.plane(plane).codec.spec(coded, dtype).values())
            total += TensorSpec((*shape[:2], tokens - stored, shape[3]), dtype).nbytes
        return total


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
        """State of the KV transforms: ``layers.<l>.<plane>.<i>.<name>``; folded ones hold none."""
        tensors: dict[str, TensorSpec] = {}
        for layer in self.kv:
            for plane, side in (("key", layer.key), ("value", layer.value)):
                for i, state in enumerate(side.states if not side.folded else ()):
                    tensors.update(
                        {state_name(layer.attention.layer, plane, i, n): s for n, s in state.items()}
                    )
        return tensors


def state_name(layer: int, plane: str, index: int, name: str) -> str:
    """Name under which a KV transform's state is stored in calibrations and artifacts."""
    return f"layers.{layer}.{plane}.{index}.{name}"
