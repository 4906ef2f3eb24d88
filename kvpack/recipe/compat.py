"""What does not go together: combinations refused by name before any work starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from kvpack.core.errors import RecipeError
from kvpack.core.model_spec import AttentionSpec, LinearSpec, ModelSpec
from kvpack.core.registry import kind_of
from kvpack.core.roles import Codec, Plane, Solver, Transform
from kvpack.core.types import TensorSpec
from kvpack.recipe.kv_plan import PLANES, KVLayerPlan
from kvpack.recipe.plan import WeightPlan
from kvpack.recipe.recipe import KVCacheRecipe

UNSTABLE_ROPE = frozenset({"dynamic", "longrope"})
"""RoPE scalings whose angles for old tokens change while the context grows."""


def check_rope(kv: KVCacheRecipe, model: ModelSpec) -> None:
    """Refuse transforms that this model's RoPE does not allow.

    Raises:
        RecipeError: a transform undoes RoPE where there is none, or where its angles
            depend on the context length.
    """
    index = () if kv.retrieve is None else kv.retrieve.index.transforms
    needs_rope = [t for t in (*kv.key.transforms, *kv.value.transforms, *index) if t.needs_rope]
    kinds = set(model.rope_type.split("+"))
    if needs_rope and kinds & UNSTABLE_ROPE:
        raise RecipeError(
            f"transform {kind_of(needs_rope[0])!r} cannot run on {model.family}",
            why=f"its RoPE scaling {model.rope_type!r} turns cached keys differently as the context grows",
            hint="use a recipe that stores keys after RoPE, such as kivi",
        )
    if needs_rope and kinds == {"none"}:
        raise RecipeError(
            f"transform {kind_of(needs_rope[0])!r} cannot run on {model.family}",
            why="the model has no RoPE",
            hint="remove the transform from the recipe",
        )
    if any(t.needs_rope for t in kv.value.transforms):
        raise RecipeError("values carry no RoPE to undo", hint="remove the transform from kv_cache.value")


def check_weight_codec(codec: Codec, solver: Solver) -> None:
    """Refuse codecs of caches for weights.

    Raises:
        RecipeError: a codec whose rows can only be decoded all together, or one that learns, beside a
            solver that gives it nothing to learn from.
    """
    if codec.segment:
        raise RecipeError(
            f"codec {kind_of(codec)!r} as configured cannot pack weights",
            why="its segments can only be decoded as a whole, and weights are read row by row",
            hint="give groups along tokens (the rows) a size, or group along channels",
        )
    if not solver.teaches and (codec.requires() or codec.state_spec((1, codec.token_block, 64))):
        raise RecipeError(
            f"codec {kind_of(codec)!r} cannot pack weights with solver {kind_of(solver)!r}",
            why="the codec has to learn, and this solver does not teach it",
            hint="use a codec that learns nothing, such as affine",
        )


def check_input_codec(codec: Codec | None) -> None:
    """Refuse codecs that cannot approximate each token of a layer's input on its own.

    Raises:
        RecipeError: the codec needs several tokens at once, or learns.
    """
    if codec is None:
        return
    if codec.token_block > 1 or codec.segment or codec.requires():
        raise RecipeError(
            f"codec {kind_of(codec)!r} as configured cannot approximate a layer's inputs",
            why="they come token by token, and nothing is learned for them",
            hint="use groups along channels: {kind: affine, bits: 8, group: {size: 0}, zero: none}",
        )


def check_measured(linear: LinearSpec, solver: Solver, model: ModelSpec) -> None:
    """Refuse solvers that want to know the input of a table of rows.

    Raises:
        RecipeError: an embedding that no linear layer shares, beside a solver that needs data.
    """
    if solver.requires() and model.applied(linear) is None:
        raise RecipeError(
            f"solver {kind_of(solver)!r} cannot choose codes for {linear.name}",
            why="an embedding is a table: no input is multiplied by it, so nothing can be measured",
            hint="give it a rule of its own before this one: "
            "{match: '@embedding', codec: ..., solver: {kind: rtn}}, or keep: true",
        )


def check_fold(plane: Plane, transforms: tuple[Transform, ...], attention: AttentionSpec) -> None:
    """Refuse folding that would change what the model computes.

    Raises:
        RecipeError: a key transform that RoPE does not let pass, a transform without a dual, one
            that depends on the token, or one that mixes heads.
    """
    if not attention.value_linear:
        raise RecipeError(
            f"{plane} transforms cannot be folded in this model",
            why=f"a norm or gate stands between projections and output projection of {attention.module}",
            hint=f"set kv_cache.{plane}.fold=false; the transform then runs as tokens are stored",
        )
    stuck = next((t for t in transforms if plane == "key" and not t.commutes_with_rope), None)
    if stuck is not None:
        raise RecipeError(
            f"transform {kind_of(stuck)!r} cannot be folded into the key projection",
            why="RoPE is applied between the projection and the cache, and does not commute with it",
            hint="set kv_cache.key.fold=false; the transform then runs as tokens are stored",
        )
    shape = (1, attention.kv_heads, 1, attention.head_dim)
    for transform in transforms:
        if not transform.linear or type(transform).dual is Transform.dual:
            raise RecipeError(
                f"transform {kind_of(transform)!r} cannot be folded", why="it has no linear dual"
            )
        if transform.shape(shape) != shape:
            raise RecipeError(
                f"transform {kind_of(transform)!r} mixes heads and cannot be folded",
                hint="use it with one head, or set fold: false",
            )


def check_window(layer: KVLayerPlan) -> None:
    """Refuse policies that drop tokens where something else relies on these.

    Raises:
        RecipeError: tokens are retrieved, stored as inputs, or shape a transform of the cache.
    """
    if not layer.narrowed:
        return
    fitted = any(t.fits_prompt for plane in (layer.key, layer.value) for t in plane.online)
    others = {"kv_cache.retrieve": layer.retrieval, "kv_cache.inputs": layer.inputs}
    other = next((name for name, part in others.items() if part is not None), None)
    if other is not None or fitted:
        raise RecipeError(
            f"policy {kind_of(layer.policy)!r} cannot be combined with "
            f"{other or 'a transform that is fitted to the prompt'}",
            why="it drops tokens that the model would read",
            hint="use policy sink_recent, which keeps all tokens",
        )


def notes(layers: Sequence[KVLayerPlan]) -> Iterator[str]:
    """What works in these layers, but not as well as it could."""
    planes = {(plane, layer.plane(plane).codecs) for layer in layers for plane in PLANES}
    for plane, codecs in sorted(planes, key=str):
        for finer, coarser in pairwise(codecs):
            by_age = layers[0].policy.scorer is None
            if by_age and finer != coarser and finer.lowering(coarser) is None:
                yield (
                    f"{plane} codes are decoded and encoded again when they step down from "
                    f"{getattr(finer, 'bits', 0)} to {getattr(coarser, 'bits', 0)} bits: "
                    "the second rounding adds error; ladders such as 8, 4, 2 bits only round codes"
                )


def shared(weights: Iterable[WeightPlan], model: ModelSpec) -> Iterator[str]:
    """Packed weights that two layers use."""
    held = {weight.linear.weight: weight.linear for weight in weights}
    for name, holder in model.tied.items():
        if holder in held:
            yield (
                f"{name.removesuffix('.weight')} is tied to {held[holder].name}: one packed tensor serves "
                "both, by the first rule that matches either"
            )


def fused_experts(weights: Mapping[str, WeightPlan], copied: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Experts that no rule can reach, where the recipe packs weights."""
    found = [n for n, t in copied.items() if len(t.shape) == 3 and ".experts." in n]
    if found and weights:
        yield (
            f"{len(found)} tensors of experts stay as they are ({found[0]} and so on): "
            "kvpack does not take the experts of this family apart"
        )


def untied(model: ModelSpec) -> Iterator[str]:
    """What an export stores twice that the source stores once."""
    for name, holder in model.untied.items():
        size = model.tensors[name].nbytes
        yield (
            f"{name} is no longer tied to {holder}: turning the residual stream makes them differ "
            f"({size:,} bytes more)"
        )


def unfolded(recipe: KVCacheRecipe | None, layers: Sequence[KVLayerPlan]) -> Iterator[str]:
    """Why key transforms that were to be folded run online."""
    if recipe is None or not (recipe.key.fold and recipe.key.transforms):
        return
    online = [layer.attention.layer for layer in layers if not layer.key.folded]
    if online:
        yield (
            "key transforms run as tokens are stored and are not folded, to the same effect: "
            f"a norm follows the key projection (layer {online[0]} and {len(online) - 1} more)"
        )
