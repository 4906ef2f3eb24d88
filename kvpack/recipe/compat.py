"""What does not go together: combinations refused by name before any work starts."""

from __future__ import annotations

from kvpack.core.errors import RecipeError
from kvpack.core.model_spec import AttentionSpec, ModelSpec
from kvpack.core.registry import kind_of
from kvpack.core.roles import Plane, Transform
from kvpack.recipe.recipe import KVCacheRecipe

UNSTABLE_ROPE = frozenset({"dynamic", "longrope"})
"""RoPE scalings whose angles for old tokens change while the context grows."""


def check_rope(kv: KVCacheRecipe, model: ModelSpec) -> None:
    """Refuse transforms that this model's RoPE does not allow.

    Raises:
        RecipeError: a transform undoes RoPE where there is none, or where its angles
            depend on the context length.
    """
    needs_rope = [t for t in (*kv.key.transforms, *kv.value.transforms) if t.needs_rope]
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


def check_fold(plane: Plane, transforms: tuple[Transform, ...], attention: AttentionSpec) -> None:
    """Refuse folding that would change what the model computes.

    Raises:
        RecipeError: keys (RoPE follows the projection), a transform without a dual, one that
            depends on the token, or one that mixes heads.
    """
    if plane == "key":
        raise RecipeError(
            "key transforms cannot be folded into the key projection",
            why="RoPE is applied between the projection and the cache",
            hint="remove `fold: true`; the transform then runs as tokens are stored",
        )
    if not attention.value_linear:
        raise RecipeError(
            "value transforms cannot be folded in this model",
            why=f"a norm or gate stands between values and output projection of {attention.module}",
            hint="set kv_cache.value.fold=false; the transform then runs as tokens are stored",
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
