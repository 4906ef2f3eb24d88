"""Recipe + ModelSpec -> Plan: concrete parts for every tensor and layer, refusals before any work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from kvpack.core.errors import RecipeError, RecipeErrors
from kvpack.core.model_spec import AttentionSpec, LinearSpec, ModelSpec
from kvpack.core.registry import kind_of
from kvpack.core.roles import Codec, Plane, Transform
from kvpack.core.types import Shape, TensorSpec
from kvpack.core.weight_code import stored_spec
from kvpack.recipe import budget, compat, fitting, inputs, patterns, ranking, retrieval
from kvpack.recipe.basis import BasisPlan, plan_basis, untie
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plan import DroppedTensor, Plan, WeightPlan
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.recipe.recipe import KVCacheRecipe, LoadedRecipe, PlaneRecipe, Tier, WeightRule
from kvpack.recipe.sparsity import SparsityPlan, plan_sparsity


def resolve(loaded: LoadedRecipe, model: ModelSpec) -> Plan:
    """Apply a recipe to a model.

    Raises:
        RecipeError: a pattern matches nothing, a tier is missing, or the recipe asks for
            something this model cannot do; every problem found is in the message.
    """
    errors: list[RecipeError] = []
    if any(rule.at == "residual" for rule in loaded.recipe.basis):
        model = untie(model)  # what was tied goes different ways
    weights = _weights(loaded, model, errors)
    kv = _kv_cache(loaded, model, errors)
    changes = _basis(loaded, model, weights, errors)
    sparsity = _sparsity(loaded, model, errors)
    if errors:
        raise errors[0] if len(errors) == 1 else RecipeErrors(errors)
    weights = _with_online(weights, changes)
    dropped = [DroppedTensor(name, reason) for name, reason in sorted(model.ignored.items())]
    dropped += [
        DroppedTensor(name, f"tied to {model.tied[name]}, stored once")
        for name in sorted(model.tied)
        if name in model.tensors
    ]
    gone = {d.name for d in dropped} | {w.linear.weight for w in weights.values()}
    copied = {n: TensorSpec(t.shape, t.dtype) for n, t in sorted(model.tensors.items()) if n not in gone}
    notes = (
        *compat.notes(kv),
        *compat.unfolded(loaded.recipe.kv_cache, kv),
        *compat.untied(model),
        *compat.shared(weights.values(), model),
        *compat.fused_experts(weights, copied),
    )
    return Plan(loaded, model, weights, copied, tuple(dropped), kv, notes, changes, sparsity)


def _weights(loaded: LoadedRecipe, model: ModelSpec, errors: list[RecipeError]) -> dict[str, WeightPlan]:
    chosen: dict[str, tuple[int, LinearSpec]] = {}
    for index, rule in enumerate(loaded.recipe.weights):
        matched = patterns.match(rule.match, model.packable)
        if not matched:
            errors.append(_no_match(loaded, index, rule, model))
        for linear in matched:
            holder = model.holder(linear) or linear
            chosen.setdefault(holder.name, (index, holder))
    plans = {}
    for name in sorted(chosen):
        index, linear = chosen[name]
        try:
            plan = _pack(index, linear, budget.at_width(loaded.recipe, index, linear.name), model)
        except RecipeError as error:
            errors.append(_located(error, loaded, f"weights.{index}"))
            continue
        if plan is not None:
            plans[name] = plan
    errors += budget.unknown(loaded.recipe, plans)
    return plans


def _pack(index: int, linear: LinearSpec, rule: WeightRule, model: ModelSpec) -> WeightPlan | None:
    if rule.keep or rule.codec is None or rule.solver is None:
        return None
    if linear.weight in model.tied:
        raise RecipeError(
            f"{linear.name} shares its weight with {model.tied[linear.weight]}",
            why="packing it alone would store it twice",
            hint=f"leave it out with {{match: {linear.name}, keep: true}} before this rule",
        )
    compat.check_weight_codec(rule.codec, rule.solver)
    compat.check_input_codec(rule.inputs)
    compat.check_measured(linear, rule.solver, model)
    tensors = stored_spec(rule.codec, linear.shape, model.tensors[linear.weight].dtype)
    inputs = None if model.applied(linear) is None else rule.inputs  # rows of a table have no input
    return WeightPlan(linear, index, rule.codec, rule.solver, tensors, inputs)


def _basis(
    loaded: LoadedRecipe, model: ModelSpec, weights: Mapping[str, WeightPlan], errors: list[RecipeError]
) -> tuple[BasisPlan, ...]:
    try:
        packed = {weight.linear.weight: weight.codec for weight in weights.values()}
        return plan_basis(loaded.recipe.basis, model, packed)
    except RecipeError as error:
        errors.append(_located(error, loaded, "basis"))
        return ()


def _with_online(weights: Mapping[str, WeightPlan], changes: tuple[BasisPlan, ...]) -> dict[str, WeightPlan]:
    """Packed layers that also transform their input."""
    found = dict(weights)
    for change in changes:
        for name, weight in found.items():
            if change.online and change.site is not None and weight.linear.weight in change.site.readers:
                online = (*weight.online, *change.transforms)
                found[name] = dataclasses.replace(weight, online=online)
    return found


def _sparsity(loaded: LoadedRecipe, model: ModelSpec, errors: list[RecipeError]) -> SparsityPlan | None:
    try:
        return plan_sparsity(loaded.recipe.sparsity, model)
    except RecipeError as error:
        errors.append(_located(error, loaded, "sparsity"))
        return None


def _no_match(loaded: LoadedRecipe, index: int, rule: WeightRule, model: ModelSpec) -> RecipeError:
    near = patterns.closest(rule.match, model.packable)
    return _located(
        RecipeError(
            f"{rule.match!r}: no linear layer of {model.architecture} matches",
            hint=f"closest: {', '.join(near)}",
        ),
        loaded,
        f"weights.{index}.match",
    )


def _located(error: RecipeError, loaded: LoadedRecipe, path: str) -> RecipeError:
    """The same error with the place in the recipe that caused it."""
    inside = (o for p, o in loaded.origins.items() if f"{p}.".startswith(f"{path}.") and o != "default")
    origin = next(inside, loaded.path)
    return RecipeError(f"{path}: {error.what}", where=origin, why=error.why, hint=error.hint)


def _kv_cache(loaded: LoadedRecipe, model: ModelSpec, errors: list[RecipeError]) -> tuple[KVLayerPlan, ...]:
    kv = loaded.recipe.kv_cache
    if kv is None:
        return ()
    try:
        compat.check_rope(kv, model)
        calibration = loaded.recipe.calibration
        kv = fitting.for_rows(kv, calibration.samples * calibration.sample_tokens)
        coded = _coded_tiers(kv)
        if kv.inputs is not None:
            inputs.check_inputs(kv, kv.inputs, coded, model)
        return tuple(_kv_layer(attention, kv, coded, model) for attention in model.attention)
    except RecipeError as error:
        errors.append(_located(error, loaded, "kv_cache"))
        return ()


def _coded_tiers(kv: KVCacheRecipe) -> tuple[Tier, ...]:
    """The tiers that encode, in the policy's order; the one inside must keep the original bytes."""
    used = (kv.policy.inside, *kv.policy.coded)
    for name in used:
        if name not in kv.tiers:
            raise RecipeError(
                f"the policy names tier {name!r}, which is not defined",
                hint=f"tiers: {', '.join(sorted(kv.tiers))}",
            )
    if len(set(used)) < len(used):
        raise RecipeError(f"the policy names a tier twice: {', '.join(used)}")
    unused = sorted(set(kv.tiers) - set(used))
    if unused:
        raise RecipeError(
            f"tier {unused[0]!r} is never used by policy {kind_of(kv.policy)!r}", hint="remove it"
        )
    inside = kv.tiers[kv.policy.inside]
    if {kind_of(inside.key), kind_of(inside.value)} != {"identity"}:
        raise RecipeError(
            f"tier {kv.policy.inside!r} is the exact window and takes codec 'identity' only",
            hint="give the compressing codec to another tier",
        )
    return tuple(kv.tiers[name] for name in kv.policy.coded)


def _kv_layer(
    attention: AttentionSpec, kv: KVCacheRecipe, coded: tuple[Tier, ...], model: ModelSpec
) -> KVLayerPlan:
    if kv.inputs is not None:
        stored = inputs.plan_layer(attention, kv, kv.inputs, coded, model)
        ranking.check_ranking(stored, model.dtype)
        compat.check_window(stored)
        return stored
    plan = KVLayerPlan(
        attention,
        _plane("key", kv.key, tuple(tier.key for tier in coded), attention, model),
        _plane("value", kv.value, tuple(tier.value for tier in coded), attention, model),
        kv.policy,
        retrieval=retrieval.plan_retrieval(kv, attention, model.dtype),
    )
    ranking.check_ranking(plan, model.dtype)
    compat.check_window(plan)
    return plan


def _plane(
    plane: Plane,
    recipe: PlaneRecipe,
    codecs: tuple[Codec, ...],
    attention: AttentionSpec,
    model: ModelSpec,
) -> PlanePlan:
    block = math.lcm(*(codec.token_block for codec in codecs))
    shape: Shape = (1, attention.kv_heads, block, attention.head_dim)
    states: list[Mapping[str, TensorSpec]] = []
    for transform in recipe.transforms:
        states.append(transform.state_spec(shape))
        shape = _checked_shape(transform, shape)
    if recipe.fold:
        compat.check_fold(plane, recipe.transforms, attention)
    # A norm of the keys has one gain for all heads; beside it the transforms run online.
    folded = recipe.fold and not (plane == "key" and attention.key_norm)
    for codec in codecs:
        codec.spec(shape, model.dtype)  # refuses here what it cannot encode
        states.append(codec.state_spec(shape))
    return PlanePlan(recipe.transforms, folded, codecs, tuple(states))


def _checked_shape(transform: Transform, shape: Shape) -> Shape:
    after = transform.shape(shape)
    if (after[0], after[2]) != (shape[0], shape[2]):
        raise RecipeError(f"transform {kind_of(transform)!r} changes the batch or token axis")
    return after
