"""What tiers that are filled by importance ask of the rest of a scheme."""

from __future__ import annotations

from kvpack.core.errors import RecipeError
from kvpack.core.registry import kind_of
from kvpack.core.roles import Codec
from kvpack.recipe.kv_plan import PLANES, KVLayerPlan


def check_ranking(layer: KVLayerPlan, dtype: str) -> None:
    """Refuse what cannot be ranked or fitted to a prompt.

    Raises:
        RecipeError: tokens are retrieved or stored as inputs at the same time, the policy has not
            two coded tiers, keys and values have different heads, or demoted tokens could not
            leave their tier.
    """
    policy = layer.policy
    fitted = [t for plane in (layer.key, layer.value) for t in plane.online if t.fits_prompt]
    if policy.scorer is None and not fitted:
        return
    if layer.retrieval is not None or layer.inputs is not None:
        cause = (
            f"policy {kind_of(policy)!r}"
            if policy.scorer is not None
            else f"transform {kind_of(fitted[0])!r}"
        )
        other = "retrieve" if layer.retrieval is not None else "inputs"
        raise RecipeError(
            f"{cause} cannot be combined with kv_cache.{other}",
            why="both decide from the queries of a forward pass what the cache holds",
            hint="leave one of them out",
        )
    if policy.scorer is None:
        return
    if len(policy.coded) != 2:
        raise RecipeError(
            f"policy {kind_of(policy)!r} ranks tokens for {len(policy.coded)} tiers, not for two"
        )
    kv_heads, channels = layer.attention.kv_heads, layer.attention.head_dim
    ranked = [layer.plane(name) for name in PLANES if layer.ranked(name)]
    heads = {plane.coded_shape((1, kv_heads, 1, channels))[1] for plane in ranked}
    if len(heads) > 1 or any(kv_heads % count for count in heads):
        raise RecipeError(
            f"keys and values reach their codecs as {' and '.join(map(str, sorted(heads)))} heads",
            why="a token is ranked once for each head, for keys and values together",
            hint="merge the heads of both planes, or of neither",
        )
    for plane in ranked if policy.demote else ():
        for codec in plane.codecs:
            _check_rows(codec, plane.coded_shape((1, kv_heads, 1, channels)), dtype)


def _check_rows(codec: Codec, shape: tuple[int, ...], dtype: str) -> None:
    alone = not codec.segment and codec.token_block == 1
    if not alone or any(s.shape[:3] != shape[:3] for s in codec.spec(shape, dtype).values()):
        raise RecipeError(
            f"codec {kind_of(codec)!r} cannot give up single tokens",
            why="it encodes several tokens or heads together, and with demote they leave one by one",
            hint="use groups along channels, or demote: false",
        )
