"""Source tensors -> artifact tensors, one at a time, in the order of the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack.calibrate.store import Calibration
from kvpack.core.errors import KvpackError
from kvpack.core.pieces import row_pieces
from kvpack.core.roles import Codec, Part, Plane
from kvpack.core.types import Payload, State
from kvpack.models.fold import fold_value
from kvpack.models.weights import SourceReader
from kvpack.recipe.plan import PLANES, KVLayerPlan, Plan, WeightPlan, state_name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Packing:
    """Packs a plan's tensors while they stream by, and remembers how well.

    `relative_errors` maps a packed layer to ``|W - W_hat| / |W|`` (Frobenius), where W is the
    weight after folding.
    """

    plan: Plan
    calibration: Calibration | None
    relative_errors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reader = SourceReader.of(self.plan.model)
        self._folded = _fold_targets(self.plan)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the artifact, named as in `Plan.artifact_tensors`, in its order."""
        payload_of = {f"{n}.{part}": (n, part) for n, w in self.plan.weights.items() for part in w.tensors}
        payload: Payload | None = None
        current = ""
        for name in self.plan.artifact_tensors():
            if name not in payload_of:
                yield name, self.source(name)
                continue
            linear, part = payload_of[name]
            if linear != current or payload is None:
                payload, current = self.pack(self.plan.weights[linear]), linear
            yield name, payload.tensors[part]

    def source(self, name: str) -> Tensor:
        """A tensor of the source in its stored dtype, folded where the plan folds it."""
        tensor = self._reader.read(name)
        layer = self._folded.get(name)
        if layer is None:
            return tensor
        states = self._states(layer, "value", layer.value.transforms)
        folded = fold_value(layer.attention, {name: tensor}, layer.value.transforms, states)
        return folded[name].to(tensor.dtype)

    def kv_states(self) -> dict[str, Tensor]:
        """State of codecs and of transforms that run online, named as in `Plan.kv_state_tensors`."""
        wanted = self.plan.kv_state_tensors()
        found = {
            state_name(layer.attention.layer, plane, i, name): tensor
            for layer in self.plan.kv
            for plane in PLANES
            for i, state in enumerate(self._states(layer, plane, layer.plane(plane).parts))
            for name, tensor in state.items()
        }
        return {name: found[name] for name in wanted}

    def _states(self, layer: KVLayerPlan, plane: Plane, parts: Sequence[Part]) -> tuple[State, ...]:
        """States of the first `parts` of a plane's chain; without a calibration they need no data."""
        if self.calibration is not None:
            return self.calibration.states(layer.attention.layer, plane)[: len(parts)]
        return tuple(part.fit({}) for part in parts)

    def pack(self, weight: WeightPlan) -> Payload:
        """Encode one linear layer: with the calibrated codes, or by its solver from the weight alone."""
        matrix = self.source(weight.linear.weight)
        payload = self.calibration.payload(weight.linear.name) if self.calibration else None
        if payload is None:
            payload = weight.solver.solve(matrix, weight.codec, {})
        _check(weight, payload)
        self.relative_errors[weight.linear.name] = relative_error(matrix, weight.codec, payload)
        return payload


def relative_error(matrix: Tensor, codec: Codec, payload: Payload) -> float:
    """``|W - W_hat| / |W|`` in the Frobenius norm, to six digits; 0 for a zero matrix."""
    import torch

    lost = whole = 0.0
    for start, stop in row_pieces(matrix.shape[0], matrix.shape[1], codec.token_block):
        exact = matrix[start:stop].double()
        decoded = codec.decode(payload.rows(start, stop), {}, torch.float32)
        lost += float((exact - decoded).square().sum())
        whole += float(exact.square().sum())
    return float(f"{math.sqrt(lost / whole):.6g}") if whole else 0.0


def _fold_targets(plan: Plan) -> Mapping[str, KVLayerPlan]:
    """Source tensors that folding changes, with the layer they belong to."""
    targets: dict[str, KVLayerPlan] = {}
    for layer in plan.kv:
        if layer.value.folded:
            value, output = layer.attention.value.linear, layer.attention.output.linear
            targets |= dict.fromkeys((f"{value}.weight", f"{value}.bias", f"{output}.weight"), layer)
    return targets


def _check(weight: WeightPlan, payload: Payload) -> None:
    """A payload that differs from its plan would make every byte count a lie."""
    for name, spec in weight.tensors.items():
        tensor = payload.tensors.get(name)
        found = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if found != (spec.shape, spec.dtype):
            raise KvpackError(
                f"codec produced {found}, planned {spec.shape} {spec.dtype}",
                where=f"{weight.linear.name}.{name}",
                hint="this is a defect in the codec's spec(); please report it",
            )
