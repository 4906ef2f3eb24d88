"""Source tensors in the basis of the artifact: what a plan folds into norms, embeddings and weights.

Every change of basis (`kvpack.recipe.basis`) touches the tensors that make a tensor of the model and
those that read it; `Folding` knows which, and applies what has been fitted so far, in the plan's
order. Key and value transforms of the cache that are folded (`kvpack.models.fold`) come last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from kvpack.core.lazy import torch
from kvpack.core.model_spec import NormSpec, Projection
from kvpack.core.roles import Plane, Transform
from kvpack.core.types import Site, State
from kvpack.core.weight_code import stored_spec
from kvpack.models.fold import fold, fold_names
from kvpack.models.weights import SourceReader
from kvpack.recipe.basis import BasisPlan
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plan import Plan, WeightPlan

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["reader", "norm", "rows", "embedding", "writer", "gain"]
"""How a change of basis touches a tensor, see `Folding._apply`."""


class Folding:
    """Reads tensors of a plan's model, folded as far as states are known.

    `basis` maps the number of a change of basis to the states of its transforms, `kv` a layer and a
    plane of its cache to those of the plane's transforms. What has no entry is not applied: a
    calibration adds entries as it goes, an export has all of them.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.basis: dict[int, Sequence[State]] = {}
        self.kv: dict[tuple[int, Plane], Sequence[State]] = {}
        self._reader = SourceReader.of(plan.model)
        self._touched: dict[str, list[tuple[BasisPlan, Part]]] = {}
        for change in plan.basis:
            for name, part in _touches(change, plan):
                if name in plan.model.tensors or name in plan.model.tied:
                    self._touched.setdefault(name, []).append((change, part))
        self._kv_touched = dict(_kv_touches(plan))
        self._rounded = {
            weight.linear.weight for weight in plan.weights.values() if not _stores_as_is(weight)
        }

    def read(self, name: str) -> Tensor:
        """A tensor: float32 where it is folded and rounded by a codec, else in its stored dtype."""
        tensor = self._reader.read(name)
        if name not in self._touched and name not in self._kv_touched:
            return tensor
        folded = self.exact(name)
        return folded if name in self._rounded else folded.to(tensor.dtype)

    def exact(self, name: str) -> Tensor:
        """A tensor in float32, folded and never rounded."""
        tensor = self._after(name, len(self.plan.basis))
        layer = self._kv_touched.get(name)
        return tensor if layer is None else self._kv_folded(layer, name, tensor)

    def _kv_folded(self, layer: KVLayerPlan, name: str, tensor: Tensor) -> Tensor:
        number = layer.attention.layer
        for plane in layer.folded_planes:
            if (number, plane) in self.kv:
                transforms, states = layer.plane(plane).transforms, self.kv[number, plane]
                # A fused projection may belong to both planes, another one to one of them.
                tensor = fold(plane, layer.attention, {name: tensor}, transforms, states).get(name, tensor)
        return tensor

    def names(self, change: BasisPlan) -> tuple[str, ...]:
        """Tensors that a change of basis touches."""
        return tuple(n for n, touched in self._touched.items() if any(c is change for c, _ in touched))

    def _after(self, name: str, count: int) -> Tensor:
        """A tensor in float32, after the first `count` changes of basis."""
        tensor = self._reader.read(name).float()
        for change, part in self._touched.get(name, ()):
            if change.number < count and change.number in self.basis:
                tensor = self._apply(change, part, name, tensor)
        return tensor

    def _apply(self, change: BasisPlan, part: Part, name: str, tensor: Tensor) -> Tensor:
        """One change of basis of one tensor.

        A "reader" W [R, C] becomes dual(W), behind a turned residual stream with the norm's gain
        taken in; a "norm"'s gain and bias go forward; "rows" are those that make the tensor; the
        "embedding" [V, C] goes forward row by row, a "writer" into the residual stream [C, I]
        column by column; a "gain" that readers have taken in becomes one.
        """
        basis = _Moves(change, self.basis[change.number], self.plan)
        if part == "reader":
            norm = self._norm_of(change, name)
            if norm is not None:
                tensor = tensor * (norm.offset + self._after(norm.weight, change.number))
            return basis.reader(tensor)
        if part == "norm":
            norm = change.place.norm
            offset = 0.0 if norm is None or name != norm.weight else norm.offset
            return basis.forward((tensor + offset)[None])[0] - offset
        if part == "rows":
            return basis.rows(name, tensor)
        if part == "gain":
            return torch.full_like(tensor, 1.0 - self._residual_norms()[name].offset)
        return basis.forward(tensor) if part == "embedding" else basis.forward_columns(tensor)

    def _norm_of(self, change: BasisPlan, name: str) -> NormSpec | None:
        """The norm between a turned residual stream and one of its readers."""
        if change.role != "residual":
            return None
        model = self.plan.model
        return next((s.norm for s in model.sites if name in s.readers), model.final_norm)

    def _residual_norms(self) -> dict[str, NormSpec]:
        model = self.plan.model
        norms = (model.final_norm, *(site.norm for site in model.sites))
        return {norm.weight: norm for norm in norms if norm is not None}


class _Moves:
    """The transforms of one change of basis with their states."""

    def __init__(self, change: BasisPlan, states: Sequence[State], plan: Plan) -> None:
        self.change, self.states, self.plan = change, states, plan
        self.at = Site(-1 if change.layer is None else change.layer, kv_heads=1)

    def _pairs(self) -> Iterator[tuple[Transform, State]]:
        return zip(self.change.transforms, self.states, strict=True)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [N, C] in the new basis."""
        wide = rows[None, None]
        for transform, state in self._pairs():
            wide = transform.forward(wide, state, self.at)
        return wide[0, 0]

    def forward_columns(self, weight: Tensor) -> Tensor:
        """Columns of a weight [C, I], or a bias [C], in the new basis."""
        return self.forward(weight[None])[0] if weight.dim() == 1 else self.forward(weight.T).T.contiguous()

    def reader(self, weight: Tensor) -> Tensor:
        """The rows of a weight [R, C] that reads the tensor."""
        if self.change.role == "attention_output":
            return self._folded(self.change.place.readers[0], weight)
        wide = weight[None, None]
        for transform, state in self._pairs():
            wide = transform.query(wide, state, self.at)
        return wide[0, 0]

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of a weight or bias that make the tensor."""
        if self.change.role == "attention_output":
            return self._folded(name, tensor)
        out = tensor.clone()
        for projection in _makers(self.change):
            for start, stop in projection.heads if name.startswith(f"{projection.linear}.") else ():
                out[start:stop] = self.forward_columns(tensor[start:stop])
        return out

    def _folded(self, name: str, tensor: Tensor) -> Tensor:
        """Value rows or output columns, head by head."""
        attention = self.plan.model.attention[self.change.place.layer]
        return fold("value", attention, {name: tensor}, self.change.transforms, self.states)[name]


def _makers(change: BasisPlan) -> tuple[Projection, ...]:
    """Rows that have to move: all factors of a product where they are permuted, else one of them."""
    site = change.site
    if site is None or site.role != "mlp_middle":
        return ()
    if any(transform.permutes for transform in change.transforms):
        return site.makers
    return () if site.scaled is None else (site.scaled,)


def _touches(change: BasisPlan, plan: Plan) -> Iterator[tuple[str, Part]]:
    """Names of tensors and how a change of basis touches them; biases need not exist."""
    site, model = change.site, plan.model
    if site is None:
        yield model.embedding, "embedding"
        yield from ((name, "reader") for name in _residual("reader", plan))
        yield from ((name, "writer") for name in _residual("writer", plan))
        for norm in (model.final_norm, *(s.norm for s in model.sites)):
            if norm is not None:
                yield norm.weight, "gain"
        return
    yield from ((name, "reader") for name in site.readers)
    if change.online:
        return
    if site.norm is not None:
        yield from ((name, "norm") for name in (site.norm.weight, site.norm.bias) if name)
    if site.role == "attention_output":
        value = model.attention[site.layer].value.linear
        yield from ((f"{value}.{kind}", "rows") for kind in ("weight", "bias"))
    for linear in dict.fromkeys(projection.linear for projection in _makers(change)):
        yield from ((f"{linear}.{kind}", "rows") for kind in ("weight", "bias"))


def _residual(side: str, plan: Plan) -> Iterator[str]:
    """Weights that read the residual stream through a norm, or add to it."""
    model = plan.model
    if side == "reader":
        for site in model.sites:
            if site.role in ("attention_input", "mlp_input"):
                yield from site.readers
        yield from (x.weight for x in model.linears if x.role == "lm_head")
        return
    for linear in model.linears:
        if linear.role in ("o", "down"):
            yield from (linear.weight, f"{linear.name}.bias")


def _kv_touches(plan: Plan) -> Iterator[tuple[str, KVLayerPlan]]:
    """Source tensors that folding the cache's transforms changes, with the layer they belong to."""
    for layer in plan.kv:
        for plane in layer.folded_planes:
            for name in fold_names(layer.attention, plane):
                if name in plan.model.tensors:
                    yield name, layer


def _stores_as_is(weight: WeightPlan) -> bool:
    """Whether a codec keeps numbers in the weight's own dtype."""
    return stored_spec(weight.codec, weight.linear.shape, "float32") != weight.tensors


def learned(basis: BasisPlan) -> bool:
    """Whether any of its transforms has to see data."""
    return any(transform.requires() for transform in basis.transforms)


def fitted_without_data(change: BasisPlan) -> Mapping[int, Sequence[State]]:
    """States of transforms that look at nothing; empty where one does."""
    return {} if learned(change) else {change.number: [t.fit({}) for t in change.transforms]}
