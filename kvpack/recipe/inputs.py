"""Planning caches that store layer inputs in the place of keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from kvpack.core.errors import RecipeError
from kvpack.core.model_spec import AttentionSpec, ModelSpec
from kvpack.core.registry import kind_of
from kvpack.core.roles import Codec, Plane
from kvpack.core.types import TensorSpec
from kvpack.recipe.compat import UNSTABLE_ROPE
from kvpack.recipe.inputs_plan import InputsPlan
from kvpack.recipe.kv_plan import PLANES, KVLayerPlan
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.recipe.recipe import DifferenceRecipe, InputsRecipe, KVCacheRecipe, Tier


def check_inputs(kv: KVCacheRecipe, inputs: InputsRecipe, coded: tuple[Tier, ...], model: ModelSpec) -> None:
    """Refuse what does not go together with cached inputs, whatever the layer.

    Raises:
        RecipeError: transforms, codecs that learn from keys or values, RoPE that cannot be applied
            again later, or differences between layers that do not hold the same tokens.
    """
    if kv.key.transforms or kv.value.transforms:
        named = kind_of((*kv.key.transforms, *kv.value.transforms)[0])
        raise RecipeError(
            f"transform {named!r} cannot be used with kv_cache.inputs",
            why="transforms see keys or values, and inputs are stored",
            hint="set kv_cache.key.transforms=[] and kv_cache.value.transforms=[]",
        )
    if kv.retrieve is not None or kv.policy.scorer is not None:
        other = "retrieve" if kv.retrieve is not None else f"policy {kind_of(kv.policy)!r}"
        raise RecipeError(
            f"{other} cannot be used with kv_cache.inputs",
            why="it looks at stored keys, and inputs are stored",
            hint="leave one of them out",
        )
    codecs = [codec for tier in coded for codec in (tier.key, tier.value)]
    codecs += [inputs.difference.base] if inputs.difference else []
    learning = next((codec for codec in codecs if codec.requires()), None)
    if learning is not None:
        raise RecipeError(
            f"codec {kind_of(learning)!r} cannot be used with kv_cache.inputs",
            why="it learns from keys or values, and inputs are stored",
            hint="use a codec that needs no calibration, such as affine",
        )
    if odd := set(model.rope_type.split("+")) & (UNSTABLE_ROPE | {"none"}):
        raise RecipeError(
            f"inputs cannot be cached for {model.family}",
            why=f"keys of old tokens cannot be made again under RoPE of type {min(odd)!r}",
            hint="use a recipe that stores keys after RoPE, such as kivi",
        )
    if inputs.difference is not None:
        _check_difference(inputs.difference, coded, model)


def _check_difference(difference: DifferenceRecipe, coded: tuple[Tier, ...], model: ModelSpec) -> None:
    sliding = next((a for a in model.attention if a.window is not None), None)
    if sliding is not None:
        raise RecipeError(
            "kv_cache.inputs.difference cannot be used with sliding windows",
            why=f"layer {sliding.layer} forgets tokens that later layers would be rebuilt from",
            hint="set kv_cache.inputs.difference=null",
        )
    if len(coded) > 1:
        raise RecipeError(
            "kv_cache.inputs.difference takes one coded tier",
            why="a token that is encoded again would change what later layers were measured against",
        )
    blocks = difference.base.token_block, coded[0].value.token_block
    if blocks[0] != blocks[1]:
        raise RecipeError(
            f"kv_cache.inputs.difference.base encodes {blocks[0]} tokens at a time, the tier {blocks[1]}",
            why="all layers must encode the same tokens at the same time",
        )


def plan_layer(
    attention: AttentionSpec,
    kv: KVCacheRecipe,
    recipe: InputsRecipe,
    coded: tuple[Tier, ...],
    model: ModelSpec,
) -> KVLayerPlan:
    """The plan of one layer that stores its input.

    Raises:
        RecipeError: the layer's keys and values cannot be made from its input by the projections,
            or X itself is asked for where it is wider than keys and values.
    """
    if not attention.value_linear:
        raise RecipeError(
            f"inputs cannot be cached for {attention.module}",
            why="it does more to its values than to project them",
        )
    inputs = _inputs(attention, recipe, model)
    planes = {}
    for plane in PLANES:
        codecs = tuple(tier.key if plane == "key" else tier.value for tier in coded)
        if inputs.link == "base" and recipe.difference is not None:
            codecs = (recipe.difference.base,)
        planes[plane] = _plane(inputs, plane, codecs, model) if plane in inputs.planes else _UNUSED
    return KVLayerPlan(attention, planes["key"], planes["value"], kv.policy, inputs)


_UNUSED = PlanePlan((), False, (), ())


def _plane(inputs: InputsPlan, plane: Plane, codecs: tuple[Codec, ...], model: ModelSpec) -> PlanePlan:
    block = math.lcm(*(codec.token_block for codec in codecs))
    shape = (1, 1, block, inputs.width(plane))
    for codec in codecs:
        codec.spec(shape, model.dtype)  # refuses here what it cannot encode
    return PlanePlan((), False, codecs, tuple(codec.state_spec(shape) for codec in codecs))


def _inputs(attention: AttentionSpec, recipe: InputsRecipe, model: ModelSpec) -> InputsPlan:
    channels = next(x.shape[1] for x in model.linears if x.name == attention.key.linear)
    width = attention.kv_heads * attention.head_dim
    if recipe.basis == "none" and channels > 2 * width:
        raise RecipeError(
            f"the input of layer {attention.layer} has {channels} channels,"
            f" its keys and values {2 * width} together",
            why="storing the input itself would take more than storing those",
            hint="set kv_cache.inputs.basis=svd",
        )
    svd = recipe.basis == "svd" or (recipe.basis == "auto" and channels > 2 * width)
    if svd and recipe.tap == "residual":
        raise RecipeError(
            f"the input of layer {attention.layer} cannot be stored in singular bases before its norm",
            why="the norm needs all channels",
            hint="set kv_cache.inputs.tap=post_norm",
        )
    link: Literal["base", "difference"] | None = None
    if recipe.difference is not None:
        link = "base" if attention.layer < recipe.difference.base_layers else "difference"
    bases: Mapping[Plane, TensorSpec] = {}
    if svd:
        dtype = "float32" if model.dtype == "float32" else "float16"
        ranks: dict[Plane, int] = {"key": width, "value": width} if link is None else {"value": 2 * width}
        bases = {p: TensorSpec((channels, min(channels, rank)), dtype) for p, rank in ranks.items()}
    return InputsPlan(channels, bases, link, recipe.tap)
