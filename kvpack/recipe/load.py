"""Recipe text to a validated `Recipe`: extends, variant, overrides, then the strict builder.

Precedence, lowest first: defaults, the recipes named by `extends` from left to right, the file,
the variant, `--set`. Messages and `LoadedRecipe.origins` name the place that had the last word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvpack.core.errors import RecipeError, RecipeErrors
from kvpack.recipe.build import INVALID, build, suggest, to_mapping
from kvpack.recipe.locate import RecipeFile, read, split_variant
from kvpack.recipe.merge import merge, set_path
from kvpack.recipe.recipe import LoadedRecipe, Recipe
from kvpack.recipe.yaml_lines import Node, Position, parse

SCHEMA_VERSION = 1
"""Value of the `kvpack:` key that this version reads."""

_NOT_INHERITED = ("name", "summary")


def load(reference: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load and validate a recipe.

    Args:
        reference: path or bundled name, with or without ``.yaml``, and an optional ``@variant``.
        overrides: ``key.path=value`` with a YAML value; list entries by number.

    Raises:
        RecipeErrors: every problem that was found in one pass, each with its place.
        RecipeError: the file cannot be found or is not YAML.
    """
    name, variant = split_variant(reference)
    file = read(name)
    root = _apply_variant(_compose(file, ()), variant, file)
    errors: list[RecipeError] = []
    for override in overrides:
        try:
            root = _override(root, override)
        except RecipeError as error:
            errors.append(error)
    root = _complete_rules(root.with_entry("variants", Node(None, root.at)))
    recipe = _build(root, errors)
    resolved = to_mapping(recipe)
    return LoadedRecipe(
        recipe=recipe,
        path=file.label,
        source=file.text,
        variant=variant,
        overrides=tuple(overrides),
        resolved=resolved,
        sha256=digest(resolved),
        origins=dict(_origins(resolved, root, "")),
    )


def variants(reference: str) -> list[str]:
    """Names of a recipe's variants, in the order of the file."""
    root = _compose(read(split_variant(reference)[0]), ())
    return list(_variants(root))


def digest(resolved: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a resolved recipe."""
    text = json.dumps(resolved, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _compose(file: RecipeFile, stack: tuple[RecipeFile, ...]) -> Node:
    """The file on top of everything that it extends."""
    if file.path in {f.path for f in stack}:
        chain = " -> ".join(f.label for f in (*stack, file))
        raise RecipeError(f"`extends` runs in a circle: {chain}", where=stack[-1].label)
    own = _expand_tiers(parse(file.text, file.label))
    _check_top(own)
    base: Node | None = None
    for reference in _references(own):
        name, variant = split_variant(str(reference.value))
        parent_file = read(name, beside=file, where=str(reference.at))
        parent = _apply_variant(_compose(parent_file, (*stack, file)), variant, parent_file)
        base = parent if base is None else merge(base, parent)
    if base is None:
        return own
    return merge(_without(base, _NOT_INHERITED), own)


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
    assert_mapping = root.value if isinstance(root.value, dict) else {}
    node = assert_mapping.get("extends")
    if node is None:
        return ()
    references = node.value if isinstance(node.value, tuple) else (node,)
    for reference in references:
        if not isinstance(reference.value, str):
            raise RecipeError(
                "extends: expected a recipe's name or path, or a list of them", where=str(reference.at)
            )
    return references


def _without(node: Node, keys: Sequence[str]) -> Node:
    entries = node.value if isinstance(node.value, dict) else {}
    return replace(node, value={k: v for k, v in entries.items() if k not in keys})


def _variants(root: Node) -> dict[str, Node]:
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


def _apply_variant(root: Node, variant: str | None, file: RecipeFile) -> Node:
    if variant is None:
        return root
    known = _variants(root)
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


def _override(root: Node, override: str) -> Node:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"{override!r} is not key.path=value", where="--set")
    value = parse(text, f"--set {path}").plain() if text.strip() else None
    return set_path(root, path, Node.of(value, Position("--set")))


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


def _complete_rules(root: Node) -> Node:
    """A weight rule with a codec and no solver rounds to nearest."""
    rules = root.value.get("weights") if isinstance(root.value, dict) else None
    if rules is None or not isinstance(rules.value, tuple):
        return root
    default = Node.of({"kind": "rtn"}, Position("default"))
    complete = tuple(
        rule.with_entry("solver", default)
        if isinstance(rule.value, dict) and "codec" in rule.value and "solver" not in rule.value
        else rule
        for rule in rules.value
    )
    return root.with_entry("weights", replace(rules, value=complete))


def _build(root: Node, errors: list[RecipeError]) -> Recipe:
    root = _without(root, ("extends", "variants"))
    recipe = build(Recipe, root, "", errors)
    if recipe is not INVALID:
        errors += _contradictions(recipe, root)
    if errors:
        raise RecipeErrors(list({error.message: error for error in errors}.values()))
    return recipe  # type: ignore[no-any-return]  # built from the annotation `Recipe`


def _contradictions(recipe: Recipe, root: Node) -> Iterator[RecipeError]:
    """What single fields cannot tell."""
    tree = root.value if isinstance(root.value, dict) else {}
    for i, rule in enumerate(recipe.weights):
        node = tree["weights"].value[i]  # type: ignore[index]  # a list, or the build had failed
        if rule.keep == (rule.codec is not None):
            what = "both `keep` and a codec" if rule.keep else "neither a codec nor `keep: true`"
            yield RecipeError(f"weights[{i}]: {what}", where=str(node.at))
    if cache := recipe.kv_cache:
        known = list(cache.tiers)
        for side in ("inside", "outside"):
            tier = getattr(cache.policy, side)
            if tier not in cache.tiers:
                what = f"kv_cache.policy.{side}: no tier is called {tier!r}{suggest(tier, known)}"
                yield RecipeError(what, where=str(tree["kv_cache"].at), hint=f"tiers: {', '.join(known)}")


def _origins(resolved: Any, node: Node | None, path: str) -> Iterator[tuple[str, str]]:
    """Key path -> place, for every single value of the resolved recipe."""
    value = node.value if node is not None else None
    if isinstance(resolved, dict) and resolved:
        for key, item in resolved.items():
            inner = value.get(key) if isinstance(value, dict) else None
            yield from _origins(item, inner, f"{path}.{key}" if path else key)
    elif isinstance(resolved, list) and resolved:
        for i, item in enumerate(resolved):
            inner = value[i] if isinstance(value, tuple) and i < len(value) else None
            yield from _origins(item, inner, f"{path}.{i}")
    else:
        yield path, node.at.origin if node is not None else "default"
