"""Which numbers inside the blocks are left out where they are small, applied to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

from kvpack.core.errors import RecipeError
from kvpack.core.model_spec import LinearSpec, ModelSpec
from kvpack.core.roles import Thresholds
from kvpack.core.types import TensorSpec
from kvpack.recipe import patterns
from kvpack.recipe.recipe import SparseInputRule, SparsityRecipe

THRESHOLD = "threshold"
"""Name of the stored tensor, below that of its module."""


@dataclass(frozen=True)
class SparseSite:
    """A vector [C] per token of which only the large numbers are kept.

    `kind` "feed_forward": the activated gate inside an FFN, which decides about rows of the up
    projection and columns of the down projection (without a gate: what the activation gives, and
    columns only). "input": what a linear layer is given. `active` is the share of numbers that was
    kept on the calibration text; None before there is any.
    """

    kind: Literal["feed_forward", "input"]
    layer: int
    channels: int = field(metadata={"minimum": 1, "maximum": 2**31})
    thresholds: Thresholds
    active: float | None = field(default=None, metadata={"minimum": 0.0, "maximum": 1.0})

    @property
    def spec(self) -> TensorSpec:
        """The stored threshold."""
        return self.thresholds.state_spec((1, 1, 1, self.channels))[THRESHOLD]


@dataclass(frozen=True)
class SparsityPlan:
    """Sparse activations of a model: `sites` by path of the FFN or of the linear layer.

    `prefill`: see `SparsityRecipe`.
    """

    sites: Mapping[str, SparseSite]
    prefill: Literal["dense", "masked"] = "dense"

    def of_layer(self, layer: int) -> dict[str, SparseSite]:
        """The sites inside a decoder block."""
        return {name: site for name, site in self.sites.items() if site.layer == layer}

    def read_share(self, linears: Sequence[LinearSpec]) -> float:
        """Share of the weights of layers inside the blocks that one generated token reads."""
        inside = [x for x in linears if x.layer is not None]
        gated = {x.name.rpartition(".")[0] for x in inside if x.role == "gate"}
        sizes = [x.shape[0] * x.shape[1] for x in inside]
        read = [size * self._share(x, gated) for size, x in zip(sizes, inside, strict=True)]
        return sum(read) / sum(sizes)

    def _share(self, linear: LinearSpec, gated: Set[str]) -> float:
        """Share of one layer; `gated` are paths of FFNs with gate and up projections of their own."""
        share = self.sites[linear.name].thresholds.keep_fraction if linear.name in self.sites else 1.0
        module = linear.name.rpartition(".")[0]
        site = self.sites.get(module)
        if site is None or site.kind != "feed_forward":
            return share
        keep = site.thresholds.keep_fraction
        if linear.role == "down" or (linear.role == "up" and module in gated):
            return share * keep
        return share * (1 + keep) / 2 if linear.role == "gate_up" else share

    def tensors(self) -> dict[str, TensorSpec]:
        """The stored thresholds, by name."""
        return {f"{name}.{THRESHOLD}": site.spec for name, site in self.sites.items()}


@dataclass(frozen=True)
class Activity:
    """How sparse a site was: the share of numbers that passed, of the `seen`, and what was skipped.

    `active` is None before a sparse pass; `wanted` is the recipe's share, `calibrated` that on its text.
    """

    active: float | None
    seen: int
    wanted: float
    calibrated: float | None
    skips: str


def mean_active(activities: Mapping[str, Activity]) -> dict[str, float]:
    """Mean share that passed, by last name of the module ("mlp", "q_proj"); where any was seen."""
    found: dict[str, list[float]] = {}
    for name, activity in activities.items():
        if activity.active is not None:
            found.setdefault(name.rpartition(".")[2], []).append(activity.active)
    return {kind: sum(shares) / len(shares) for kind, shares in found.items()}


def plan_sparsity(recipe: SparsityRecipe | None, model: ModelSpec) -> SparsityPlan | None:
    """Apply the section to a model; None without one.

    Raises:
        RecipeError: the model has no FFN of a known kind, experts, or nothing that a rule matches.
    """
    if recipe is None:
        return None
    sites = _feed_forwards(recipe.gate, model) if recipe.gate is not None else {}
    for rule in reversed(recipe.inputs):
        for linear in _matched(rule, model):
            if rule.thresholds is not None:
                layer, width = linear.layer or 0, linear.shape[1]
                sites[linear.name] = SparseSite("input", layer, width, rule.thresholds)
            else:
                sites.pop(linear.name, None)
    if not sites:
        raise RecipeError("names nothing", hint="give it a gate, or inputs with thresholds")
    return SparsityPlan(dict(sorted(sites.items())), recipe.prefill)


def _feed_forwards(thresholds: Thresholds, model: ModelSpec) -> dict[str, SparseSite]:
    """One site per FFN: the module that holds the down projection."""
    found: dict[str, SparseSite] = {}
    for linear in (x for x in model.linears if x.role == "down" and x.layer is not None):
        if "expert" in linear.name:
            raise RecipeError(
                f"gate: {linear.name} belongs to one of several experts",
                why="thresholds per expert are not supported: most see too little of the text",
                hint="leave the gate out and give sparsity.inputs rules for attention",
            )
        module, layer = linear.name.rpartition(".")[0], linear.layer or 0
        found[module] = SparseSite("feed_forward", layer, linear.shape[1], thresholds)
    missing = sorted(set(range(len(model.blocks))) - {site.layer for site in found.values()})
    if missing or len(found) > len(model.blocks):
        raise RecipeError(
            f"gate: {model.architecture} has not one FFN of a known kind in every block",
            why=f"block {missing[0]} has no down projection" if missing else "some blocks have several",
            hint="leave the gate out and give sparsity.inputs rules",
        )
    return found


def _matched(rule: SparseInputRule, model: ModelSpec) -> Sequence[LinearSpec]:
    """Layers of a rule; refuses what a matrix for queries, keys and values at once does not allow."""
    matched = [x for x in patterns.match(rule.match, model.linears) if x.layer is not None]
    if any("expert" in linear.name for linear in matched):
        raise RecipeError(
            f"inputs: {rule.match!r} matches layers of experts",
            why="thresholds per expert are not supported: most see too little of the text",
            hint="match attention layers only",
        )
    if matched:
        return matched
    fused = any(linear.role == "qkv" for linear in model.linears)
    raise RecipeError(
        f"inputs: {rule.match!r}: no linear layer in the blocks of {model.architecture} matches",
        why="it makes queries, keys and values with one matrix" if fused else "",
        hint="use a recipe for the FFN alone, such as chess@ffn, or match '@qkv' too"
        if fused
        else f"closest: {', '.join(patterns.closest(rule.match, model.linears))}",
    )
