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
from kvpack.recipe.compose import apply_variant, compose, without
from kvpack.recipe.compose import variants as variants_of
from kvpack.recipe.locate import read, split_variant
from kvpack.recipe.merge import set_path
from kvpack.recipe.recipe import LoadedRecipe, Recipe
from kvpack.recipe.yaml_lines import Node, Position, parse


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
    root = apply_variant(compose(file), variant, file)
    errors: list[RecipeError] = []
    for override in overrides:
        root = _override(root, override, errors)
    root = _complete_budget(_complete_rules(root.with_entry("variants", Node(None, root.at))))
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


def from_resolved(resolved: Mapping[str, Any], path: str, source: str, variant: str | None) -> LoadedRecipe:
    """A recipe from its resolved mapping, as an artifact's manifest holds it.

    Raises:
        RecipeErrors: it is not what this version resolves recipes to.
    """
    recipe = _build(Node.of(resolved, Position(path)), [])
    plain = to_mapping(recipe)
    return LoadedRecipe(recipe, path, source, variant, (), plain, digest(plain), {})


def variants(reference: str) -> list[str]:
    """Names of a recipe's variants, in the order of the file."""
    return list(variants_of(compose(read(split_variant(reference)[0]))))


def digest(resolved: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a resolved recipe."""
    text = json.dumps(resolved, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _override(root: Node, override: str, errors: list[RecipeError]) -> Node:
    path, equals, text = override.partition("=")
    try:
        if not equals or not path:
            raise RecipeError(f"{override!r} is not key.path=value", where="--set")
        # A role such as @mlp is text, but no YAML without quotes.
        text = json.dumps(text) if text.startswith("@") else text
        value = parse(text, f"--set {path}").plain() if text.strip() else None
        return set_path(root, path, Node.of(value, Position("--set")))
    except RecipeError as error:
        errors.append(error)
        return root


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


def _complete_budget(root: Node) -> Node:
    """A budget without an allocator is spent by output errors."""
    budget = root.value.get("budget") if isinstance(root.value, dict) else None
    if budget is None or not isinstance(budget.value, dict) or "allocator" in budget.value:
        return root
    default = Node.of({"kind": "output_error"}, Position("default"))
    return root.with_entry("budget", budget.with_entry("allocator", default))


def _build(root: Node, errors: list[RecipeError]) -> Recipe:
    root = without(root, ("extends", "variants"))
    recipe = build(Recipe, root, "", errors)
    if recipe is not INVALID:
        errors += _contradictions(recipe, root)
    if errors:
        raise RecipeErrors(list({error.message: error for error in errors}.values()))
    return recipe  # type: ignore[no-any-return]  # built from the annotation `Recipe`


def _contradictions(recipe: Recipe, root: Node) -> Iterator[RecipeError]:
    """What single fields cannot tell."""
    tree = root.value if isinstance(root.value, dict) else {}
    rules = tree["weights"].value if "weights" in tree else ()
    nodes = rules if isinstance(rules, tuple) else ()
    for i, rule in enumerate(recipe.weights):
        if rule.keep == (rule.codec is not None):
            what = "both `keep` and a codec" if rule.keep else "neither a codec nor `keep: true`"
            yield RecipeError(f"weights.{i}: {what}", where=str(nodes[i].at))
    if cache := recipe.kv_cache:
        known = list(cache.tiers)
        for tier in (cache.policy.inside, *cache.policy.coded):
            if tier not in cache.tiers:
                what = f"kv_cache.policy: no tier is called {tier!r}{suggest(tier, known)}"
                yield RecipeError(what, where=str(tree["kv_cache"].at), hint=f"tiers: {', '.join(known)}")


def _origins(resolved: Any, node: Node | None, path: str) -> Iterator[tuple[str, str]]:
    """Key path -> place, for every value and every mapping or list of the resolved recipe."""
    value = node.value if node is not None else None
    if path:
        yield path, node.at.origin if node is not None else "default"
    if isinstance(resolved, dict):
        inner = {key: value.get(key) if isinstance(value, dict) else None for key in resolved}
    elif isinstance(resolved, list):
        resolved = {str(i): item for i, item in enumerate(resolved)}
        inner = {i: value[int(i)] if isinstance(value, tuple) else None for i in resolved}
    else:
        return
    for key, item in resolved.items():
        yield from _origins(item, inner[key], f"{path}.{key}" if path else key)
