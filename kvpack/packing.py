"""Source tensors -> artifact tensors, one at a time, in the order of the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack.calibrate.store import Calibration
from kvpack.core import weight_code
from kvpack.core.errors import KvpackError
from kvpack.core.model_spec import Projection
from kvpack.core.pieces import row_pieces
from kvpack.core.roles import Codec, Part
from kvpack.core.types import Solution, State
from kvpack.models.fold import fold, fold_names
from kvpack.models.weights import SourceReader
from kvpack.recipe.inputs_plan import basis_name
from kvpack.recipe.plan import KVLayerPlan, Plan, WeightPlan, state_name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Packing:
    """Packs a plan's tensors while they stream by, and remembers how well.

    `relative_errors` maps a packed layer to ``|W - W_hat| / |W|`` (Frobenius), where W is the
    weight after folding. `learned` gives states by stored name where there is no calibration.
    """

    plan: Plan
    calibration: Calibration | None
    relative_errors: dict[str, float] = field(default_factory=dict)
    learned: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reader = SourceReader.of(self.plan.model)
        self._folded = _fold_targets(self.plan)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the artifact, named as in `Plan.artifact_tensors`, in its order."""
        payload_of = {f"{n}.{part}": (n, part) for n, w in self.plan.weights.items() for part in w.tensors}
        packed: Mapping[str, Tensor] = {}
        current = ""
        for name in self.plan.artifact_tensors():
            if name not in payload_of:
                yield name, self.source(name)
                continue
            linear, part = payload_of[name]
            if linear != current:
                packed, current = self.pack(self.plan.weights[linear]).tensors, linear
            yield name, packed[part]

    def source(self, name: str) -> Tensor:
        """A tensor of the source in its stored dtype, folded where the plan folds it."""
        tensor = self._reader.read(name)
        layer = self._folded.get(name)
        if layer is None:
            return tensor
        folded = tensor
        for plane in layer.folded_planes:
            parts = layer.plane(plane).transforms
            states = self._states(layer, plane, parts)
            # A fused projection may belong to both planes, another one to one of them.
            found = fold(plane, layer.attention, {name: folded}, parts, states)
            folded = found.get(name, folded)
        return folded.to(tensor.dtype)

    def kv_states(self) -> dict[str, Tensor]:
        """State of codecs and of transforms that run online, named as in `Plan.kv_state_tensors`."""
        wanted = self.plan.kv_state_tensors()
        found = {
            state_name(layer.attention.layer, chain_name, i, name): tensor
            for layer in self.plan.kv
            for chain_name, chain in layer.chains.items()
            for i, state in enumerate(self._states(layer, chain_name, chain.parts))
            for name, tensor in state.items()
        }
        for layer in self.plan.kv:
            found |= self._bases(layer)
        return {name: found[name] for name in wanted}

    def _bases(self, layer: KVLayerPlan) -> dict[str, Tensor]:
        """Singular bases in which a layer stores its input, of the weights as the artifact has them."""
        import torch

        from kvpack import ops

        if layer.inputs is None or not layer.inputs.bases:
            return {}
        sides = {"key": layer.attention.key, "value": layer.attention.value}
        joint = layer.inputs.planes == ("value",)
        found = {}
        for plane, spec in layer.inputs.bases.items():
            parts = sides.values() if joint else (sides[plane],)
            rows = torch.cat([self._projection(part) for part in parts])
            basis = ops.singular.input_basis(rows).to(getattr(torch, spec.dtype))
            found[basis_name(layer.attention.layer, plane)] = basis.contiguous()
        return found

    def _projection(self, projection: Projection) -> Tensor:
        """Rows of all heads, as new tokens meet them: decoded where they are packed."""
        import torch

        packed = self.plan.weights.get(projection.linear)
        if packed is None:
            matrix = self.source(f"{projection.linear}.weight")
        else:
            found = self.pack(packed)
            matrix = packed.codec.decode(found.payload, found.state, torch.float32)
        return torch.cat([matrix[start:stop] for start, stop in projection.heads])

    def _states(self, layer: KVLayerPlan, chain: str, parts: Sequence[Part]) -> tuple[State, ...]:
        """States of the first `parts` of a chain; without a calibration they need no data."""
        number = layer.attention.layer
        if self.calibration is not None:
            return self.calibration.states(number, chain)[: len(parts)]
        states = layer.chains[chain].states
        return tuple(
            {n: self.learned[state_name(number, chain, i, n)] for n in states[i]}
            if part.requires()
            else part.fit({})
            for i, part in enumerate(parts)
        )

    def pack(self, weight: WeightPlan) -> Solution:
        """Encode one linear layer: with the calibrated codes, or by its solver from the weight alone."""
        matrix = self.source(weight.linear.weight)
        stored = self.calibration.solved(weight.linear.name) if self.calibration else None
        if stored is None:
            found = weight.solver.solve(matrix, weight.codec, {})
        else:
            found = weight_code.solution(weight.codec, stored, weight.linear.shape)
        _check(weight, found.tensors)
        self.relative_errors[weight.linear.name] = relative_error(matrix, weight.codec, found)
        return found


def relative_error(matrix: Tensor, codec: Codec, found: Solution) -> float:
    """``|W - W_hat| / |W|`` in the Frobenius norm, to six digits; 0 for a zero matrix."""
    import torch

    lost = whole = 0.0
    for start, stop in row_pieces(matrix.shape[0], matrix.shape[1], codec.token_block):
        exact = matrix[start:stop].double()
        decoded = codec.decode(found.payload.rows(start, stop), found.state, torch.float32)
        lost += float((exact - decoded).square().sum())
        whole += float(exact.square().sum())
    return float(f"{math.sqrt(lost / whole):.6g}") if whole else 0.0


def _fold_targets(plan: Plan) -> Mapping[str, KVLayerPlan]:
    """Source tensors that folding changes, with the layer they belong to."""
    targets: dict[str, KVLayerPlan] = {}
    for layer in plan.kv:
        for plane in layer.folded_planes:
            targets |= dict.fromkeys(fold_names(layer.attention, plane), layer)
    return targets


def _check(weight: WeightPlan, tensors: Mapping[str, Tensor]) -> None:
    """Tensors that differ from their plan would make every byte count a lie."""
    for name, spec in weight.tensors.items():
        tensor = tensors.get(name)
        found = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if found != (spec.shape, spec.dtype):
            raise KvpackError(
                f"codec produced {found}, planned {spec.shape} {spec.dtype}",
                where=f"{weight.linear.name}.{name}",
                hint="this is a defect in the codec's spec(); please report it",
            )
