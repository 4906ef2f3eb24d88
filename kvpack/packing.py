"""Source tensors -> artifact tensors, a few at a time, in the order of the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from kvpack.calibrate.store import Calibration
from kvpack.core import weight_code
from kvpack.core.ahead import in_order
from kvpack.core.errors import KvpackError
from kvpack.core.model_spec import Projection
from kvpack.core.pieces import row_pieces
from kvpack.core.roles import Codec, Part
from kvpack.core.types import Payload, Solution, State
from kvpack.folding import Folding
from kvpack.recipe.basis import BasisPlan, basis_state
from kvpack.recipe.inputs_plan import basis_name
from kvpack.recipe.kv_plan import KVLayerPlan, state_name
from kvpack.recipe.plan import Plan, WeightPlan
from kvpack.recipe.sparsity import THRESHOLD, SparsityPlan

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
        self._folding = Folding(self.plan)
        for change in self.plan.basis:
            self._folding.basis[change.number] = self._basis_states(change)
        for layer in self.plan.kv:
            for plane in layer.folded_planes:
                parts = layer.plane(plane).transforms
                self._folding.kv[layer.attention.layer, plane] = self._states(layer, plane, parts)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the artifact, named as in `Plan.artifact_tensors`, in its order."""
        linear_of = {f"{n}.{part}": n for n, w in self.plan.weights.items() for part in w.tensors}
        names = groupby(self.plan.artifact_tensors(), lambda name: linear_of.get(name, name))
        thresholds = self.thresholds()
        tasks = (partial(self._named, owner, list(group), thresholds) for owner, group in names)
        for tensors in in_order(tasks):
            yield from tensors.items()

    def _named(self, owner: str, names: Sequence[str], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a packed layer, or one that is known or copied."""
        weight = self.plan.weights.get(owner)
        if weight is None:
            return {owner: known[owner] if owner in known else self.source(owner)}
        packed = self.pack(weight).tensors
        return {name: packed[name.removeprefix(f"{owner}.")] for name in names}

    def thresholds(self) -> dict[str, Tensor]:
        """Calibrated thresholds of sparse activations, by the name they are stored under."""
        sparsity, known = self.plan.sparsity, self.calibration
        if sparsity is None or known is None:
            return {}
        return {f"{module}.{THRESHOLD}": known.threshold(module)[0] for module in sparsity.sites}

    def sparsity(self) -> SparsityPlan | None:
        """The plan of sparse activations, knowing what was active on the calibration text."""
        sparsity, known = self.plan.sparsity, self.calibration
        if sparsity is None or known is None:
            return sparsity
        sites = {m: replace(site, active=known.threshold(m)[1]) for m, site in sparsity.sites.items()}
        return replace(sparsity, sites=sites)

    def source(self, name: str) -> Tensor:
        """A tensor of the source, folded where the plan folds it: then float32 where it is packed.

        All others are in their stored dtype.
        """
        return self._folding.read(name)

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
        for change in self.plan.basis:
            for i, state in enumerate(self._folding.basis[change.number]):
                found |= {basis_state(change.number, i, name): tensor for name, tensor in state.items()}
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

    def _basis_states(self, change: BasisPlan) -> Sequence[State]:
        """What the transforms of a change of basis have learned."""
        if self.calibration is not None:
            return self.calibration.basis_states(change)
        names = [{n: basis_state(change.number, i, n) for n in spec} for i, spec in enumerate(change.states)]
        return [
            {n: self.learned[stored] for n, stored in found.items()} if part.requires() else part.fit({})
            for part, found in zip(change.transforms, names, strict=True)
        ]

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
    lost = whole = 0.0
    for start, stop in row_pieces(matrix.shape[0], matrix.shape[1], codec.token_block):
        sums = _squares(matrix[start:stop], codec, found.payload.rows(start, stop), found.state)
        lost, whole = lost + sums[0], whole + sums[1]
    return float(f"{math.sqrt(lost / whole):.6g}") if whole else 0.0


def _squares(rows: Tensor, codec: Codec, payload: Payload, state: State) -> tuple[float, float]:
    """Sums of the squares of what the codes of `rows` lose, and of `rows`."""
    import torch

    from kvpack import kernels, ops

    coded = codec.coded_rows(payload, state)
    if coded is not None and coded.kind == "even" and coded.of == 1 and coded.width == coded.channels:
        grid = coded.first, coded.second, coded.bits, "channel", coded.group, coded.channels
        return kernels.affine_encode.lost(rows, ops.packed_affine.AffineCodes(coded.codes, *grid))
    return kernels.affine_encode.squares(rows, codec.decode(payload, state, torch.float32))


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
