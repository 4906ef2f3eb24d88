"""Planning retrieval: an index over keys for every layer that keeps its whole context."""

from __future__ import annotations

from collections.abc import Mapping

from kvpack.core.errors import RecipeError
from kvpack.core.model_spec import AttentionSpec
from kvpack.core.registry import kind_of
from kvpack.core.roles import Transform
from kvpack.core.types import Shape, TensorSpec
from kvpack.recipe.kv_plan import RetrievalPlan
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.recipe.recipe import IndexRecipe, KVCacheRecipe


def plan_retrieval(kv: KVCacheRecipe, attention: AttentionSpec, dtype: str) -> RetrievalPlan | None:
    """Retrieval in one layer; None where there is none.

    Raises:
        RecipeError: the index cannot code keys one by one, the scheme stores no keys, or the model
            would make other keys.
    """
    if kv.retrieve is None or attention.window is not None:
        return None
    if kv.inputs is not None:
        raise RecipeError(
            "retrieve and inputs exclude each other",
            why="an index scores keys, and the scheme stores the inputs of attention",
            hint="leave one of them out",
        )
    if kv.key.fold and kv.key.transforms:
        raise RecipeError(
            "retrieve and folded key transforms exclude each other",
            why="an index is made for the model's own keys",
            hint="set kv_cache.key.fold=false; the transforms then run as tokens are stored",
        )
    index = _index(kv.retrieve.index, attention, dtype)
    return RetrievalPlan(kv.retrieve.retriever, index, kv.retrieve.residency)


def _index(recipe: IndexRecipe, attention: AttentionSpec, dtype: str) -> PlanePlan:
    codec = recipe.codec
    if codec.token_block > 1 or codec.segment:
        raise RecipeError(
            f"retrieve.index: codec {kind_of(codec)!r} encodes tokens in groups",
            why="every token must be found as soon as it is there",
            hint="use vector, or affine with groups along channels",
        )
    shape: Shape = (1, attention.kv_heads, 1, attention.head_dim)
    states: list[Mapping[str, TensorSpec]] = []
    for transform in recipe.transforms:
        states.append(transform.state_spec(shape))
        shape = transform.shape(shape)
        if shape[1] != attention.kv_heads:
            raise RecipeError(
                f"retrieve.index: transform {kind_of(transform)!r} merges heads",
                why="each head is searched for itself",
                hint="use it with one head",
            )
        if not _has_query_side(transform):
            raise RecipeError(
                f"retrieve.index: transform {kind_of(transform)!r} has no query side",
                hint="use rope_window to undo RoPE",
            )
    codec.spec(shape, dtype)  # refuses here what it cannot encode
    return PlanePlan(recipe.transforms, False, (codec,), (*states, codec.state_spec(shape)))


def _has_query_side(transform: Transform) -> bool:
    kind = type(transform)
    return kind.query is not Transform.query or kind.dual is not Transform.dual
