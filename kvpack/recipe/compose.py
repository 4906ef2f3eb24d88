"""From files to one tree: `extends`, variants and shorthands, before anything is validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvpack.core.errors import RecipeError
from kvpack.recipe.build import suggest
from kvpack.recipe.locate import RecipeFile, read, split_variant
from kvpack.recipe.merge import merge, set_path
from kvpack.recipe.yaml_lines import Node, parse

SCHEMA_VERSION = 1
"""Value of the `kvpack:` key that this version reads."""

_NOT_INHERITED = ("name", "summary")


def compose(file: RecipeFile, stack: tuple[RecipeFile, ...] = ()) -> Node:
    """The file on top of everything that it extends.

    Args:
        file: the recipe.
        stack: the recipes whose `extends` led here, outermost first.

    Raises:
        RecipeError: wrong version, a recipe that is not found, or a circle.
    """
    if file.path in {f.path for f in stack}:
        chain = " -> ".join(f.label for f in (*stack, file))
        raise RecipeError(f"`extends` runs in a circle: {chain}", where=stack[-1].label)
    own = _expand_tiers(parse(file.text, file.label))
    _check_top(own)
    base: Node | None = None
    for reference in _references(own):
        name, variant = split_variant(str(reference.value))
        parent_file = read(name, beside=file, where=str(reference.at))
        parent = apply_variant(compose(parent_file, (*stack, file)), variant, parent_file)
        base = parent if base is None else merge(base, parent)
    if base is None:
        return own
    return merge(without(base, _NOT_INHERITED), own)


def _check_top(root: Node) -> None:
    if not isinstance(root.value, dict):
        raise RecipeError("a recipe is a mapping", where=str(root.at), hint="begin with `kvpack: 1`")
    version = root.value.get("kvpack")
    if version is None:
        raise RecipeError("kvpack: missing", where=root.at.file, hint="begin with `kvpack: 1`")
    if type(version.value) is not int or version.value != SCHEMA_VERSION:
        raise RecipeError(
            f"kvpack: recipe version {version.value!r} is not supported, this kvpack reads {SCHEMA_VERSION}",
            where=str(version.at),
            hint="upgrade kvpack" if isinstance(version.value, int) and version.value > 1 else "",
        )


def _references(root: Node) -> tuple[Node, ...]:
    node = root.value.get("extends") if isinstance(root.value, dict) else None
    if node is None:
        return ()
    references = node.value if isinstance(node.value, tuple) else (node,)
    for reference in references:
        if not isinstance(reference.value, str):
            raise RecipeError(
                "extends: expected a recipe's name or path, or a list of them", where=str(reference.at)
            )
    return references


def without(node: Node, keys: Sequence[str]) -> Node:
    """A mapping without some of its keys."""
    entries = node.value if isinstance(node.value, dict) else {}
    return replace(node, value={k: v for k, v in entries.items() if k not in keys})


def variants(root: Node) -> dict[str, Node]:
    """The changes of each variant, by name."""
    node = root.value.get("variants") if isinstance(root.value, dict) else None
    if node is None:
        return {}
    if not isinstance(node.value, dict):
        raise RecipeError("variants: expected a mapping of names", where=str(node.at))
    for name, changes in node.value.items():
        if not isinstance(changes.value, dict):
            raise RecipeError(
                f"variants.{name}: expected a mapping of key paths to values", where=str(changes.at)
            )
    return node.value


def apply_variant(root: Node, variant: str | None, file: RecipeFile) -> Node:
    """`root` with the changes of one of its variants."""
    if variant is None:
        return root
    known = variants(root)
    if variant not in known:
        raise RecipeError(
            f"no variant {variant!r}{suggest(variant, list(known))}",
            where=file.label,
            hint=f"variants: {', '.join(known)}" if known else "the recipe has no variants",
        )
    changes = known[variant].value
    for path, value in changes.items() if isinstance(changes, dict) else ():
        root = set_path(root, path, value)
    return root


def _expand_tiers(root: Node) -> Node:
    """`codec:` of a tier stands for its key and its value side."""
    cache = root.value.get("kv_cache") if isinstance(root.value, dict) else None
    tiers = cache.value.get("tiers") if cache is not None and isinstance(cache.value, dict) else None
    if cache is None or tiers is None or not isinstance(tiers.value, dict):
        return root
    expanded = {name: _expand_tier(name, tier) for name, tier in tiers.value.items()}
    return root.with_entry("kv_cache", cache.with_entry("tiers", replace(tiers, value=expanded)))


def _expand_tier(name: str, tier: Node) -> Node:
    if not isinstance(tier.value, dict) or "codec" not in tier.value:
        return tier
    if len(tier.value) > 1:
        raise RecipeError(
            f"kv_cache.tiers.{name}: `codec` stands for both sides, so nothing may stand beside it",
            where=str(tier.value["codec"].key_at),
        )
    return replace(tier, value=dict.fromkeys(("key", "value"), tier.value["codec"]))
