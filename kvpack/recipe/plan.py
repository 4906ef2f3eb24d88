"""The plan: a recipe applied to one model, every tensor and every byte accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvpack.core.model_spec import LinearSpec, ModelSpec
from kvpack.core.roles import Codec, Part, Solver, Transform
from kvpack.core.types import TensorSpec
from kvpack.recipe.basis import BasisPlan
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.recipe import LoadedRecipe
from kvpack.recipe.sparsity import SparsityPlan


@dataclass(frozen=True)
class WeightPlan:
    """A linear layer that is packed: by which parts, into which tensors.

    `tensors` are the codec's payload and what it learns for this weight (`kvpack.core.weight_code`);
    `inputs` approximates what the layer is given, token by token, None where that stays as it is.
    `online` transforms, which learn nothing, run on that before.
    """

    linear: LinearSpec
    rule: int
    codec: Codec
    solver: Solver
    tensors: Mapping[str, TensorSpec]
    inputs: Codec | None = None
    online: tuple[Transform, ...] = ()

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
class Plan:
    """Everything an export will do, before it does anything.

    `notes` are sentences for the user: what will work, but not as well as it could.
    """

    recipe: LoadedRecipe
    model: ModelSpec
    weights: Mapping[str, WeightPlan]
    copied: Mapping[str, TensorSpec]
    dropped: tuple[DroppedTensor, ...]
    kv: tuple[KVLayerPlan, ...]
    notes: tuple[str, ...] = ()
    basis: tuple[BasisPlan, ...] = ()
    sparsity: SparsityPlan | None = None

    def kv_parts(self) -> Iterator[Part]:
        """Every transform and codec of the cache, all layers."""
        return (part for layer in self.kv for chain in layer.chains.values() for part in chain.parts)

    def artifact_tensors(self) -> dict[str, TensorSpec]:
        """Every weight tensor of the artifact, by name, in the order it is written.

        The order is by decoder block, then by name, so that a block can be read, packed, written
        and freed before the next one.
        """
        tensors = dict(self.copied)
        for name, weight in self.weights.items():
            tensors.update({f"{name}.{part}": spec for part, spec in weight.tensors.items()})
        if self.sparsity is not None:
            tensors.update(self.sparsity.tensors())
        first = len(self.model.blocks)

        def order(name: str) -> tuple[int, str]:
            block = self.model.block_of(name)
            return (first if block is None else block, name)

        return {name: tensors[name] for name in sorted(tensors, key=order)}

    def source_bytes(self) -> dict[str, int]:
        """Bytes of the source that tensors of the artifact stand for; one of a packed layer does for all."""
        found = {name: spec.nbytes for name, spec in self.copied.items()}
        for name, weight in self.weights.items():
            stored = self.model.tied.get(weight.linear.weight, weight.linear.weight)
            found[f"{name}.{max(weight.tensors)}"] = self.model.tensors[stored].nbytes
        return found

    def packed_tensors(self) -> list[str]:
        """Names of the tensors of packed layers: those that lossless coding is for."""
        return [f"{name}.{part}" for name, weight in self.weights.items() for part in weight.tensors]

    def kv_state_tensors(self) -> dict[str, TensorSpec]:
        """States and bases that caches read, by name; of folded transforms what they learned."""
        tensors = {n: spec for change in self.basis for n, spec in change.state_tensors().items()}
        for layer in self.kv:
            tensors.update(layer.state_tensors())
        return tensors
