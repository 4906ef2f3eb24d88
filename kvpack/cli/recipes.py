"""`kvpack recipes list | show | validate | schema`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from kvpack.cli.console import table
from kvpack.cli.options import AllowDownload, Overrides, RecipeReference
from kvpack.cli.run import Result, Session
from kvpack.recipe.load import load, variants
from kvpack.recipe.locate import bundled
from kvpack.recipe.recipe import LoadedRecipe, Recipe


def recipes_list(session: Session) -> Result:
    """List the bundled recipes and their variants."""
    rows = [_row(name) for name in bundled() if not name.startswith("fragments/")]
    columns = ("name", "variants", "fidelity", "needs data", "summary")
    shown = [
        (r["name"], " ".join(r["variants"]), r["fidelity"], "yes" if r["needs_data"] else "no", r["summary"])
        for r in rows
    ]
    return Result({"recipes": rows}, (table(columns, shown),))


def recipes_show(
    session: Session,
    reference: RecipeReference,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="As it is used: extends, variant, --set and defaults applied.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="List every value with the file and line that set it.")
    ] = False,
    overrides: Overrides = None,
) -> Result:
    """Print a recipe, as its file has it unless an option asks for more."""
    loaded = load(reference, overrides or ())
    data = {**_summary(loaded), "resolved": loaded.resolved, "origins": loaded.origins}
    if explain:
        rows = [(path, value, loaded.origins[path]) for path, value in _leaves(loaded.resolved)]
        return Result(data, (table(("key", "value", "from"), rows),))
    changed = resolved or loaded.variant is not None or loaded.overrides
    return Result(data, (_yaml(loaded) if changed else loaded.source.rstrip(),))


def recipes_validate(
    session: Session,
    reference: RecipeReference,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Also check it against this model: folder or hub id."),
    ] = None,
    allow_download: AllowDownload = False,
    overrides: Overrides = None,
) -> Result:
    """Check a recipe; with --model, that every pattern matches and the model can do it."""
    loaded = load(reference, overrides or ())
    data = _summary(loaded)
    if model is not None:
        from kvpack.models import open_model
        from kvpack.recipe.resolve import resolve

        plan = resolve(loaded, open_model(model, allow_download=allow_download))
        data["model"] = plan.model.architecture
        data["packed_layers"], data["kv_layers"] = len(plan.weights), len(plan.kv)
    return Result(data, (f"{loaded.path}: valid, hash {loaded.sha256[:12]}",))


def recipes_schema(session: Session) -> Result:
    """Print the JSON Schema of recipes, for editors."""
    from kvpack.recipe.json_schema import recipe_schema

    schema = recipe_schema()
    return Result(schema, (json.dumps(schema, indent=2),))


def needs_data(recipe: Recipe) -> bool:
    """Whether a recipe asks for statistics, and so for calibration text."""
    parts: list[Any] = [rule.solver for rule in recipe.weights]
    if cache := recipe.kv_cache:
        parts += [*cache.key.transforms, *cache.value.transforms, cache.policy]
        parts += [codec for tier in cache.tiers.values() for codec in (tier.key, tier.value)]
    return any(part is not None and part.requires() for part in parts)


def _row(name: str) -> dict[str, Any]:
    loaded = load(name)
    recipe = loaded.recipe
    return {
        "name": name,
        "summary": recipe.summary,
        "variants": variants(name),
        "fidelity": recipe.fidelity.level if recipe.fidelity else "",
        "paper": recipe.paper.arxiv if recipe.paper else "",
        "weights": bool(recipe.weights),
        "kv_cache": recipe.kv_cache is not None,
        "needs_data": needs_data(recipe),
    }


def _summary(loaded: LoadedRecipe) -> dict[str, Any]:
    return {
        "name": loaded.recipe.name,
        "path": loaded.path,
        "variant": loaded.variant,
        "overrides": list(loaded.overrides),
        "sha256": loaded.sha256,
    }


def _yaml(loaded: LoadedRecipe) -> str:
    import yaml

    text: str = yaml.safe_dump(loaded.resolved, sort_keys=False, allow_unicode=True, width=100)
    return f"# {loaded.path}, sha256 {loaded.sha256}\n{text.rstrip()}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}.{i}")
    else:
        yield path, json.dumps(value, ensure_ascii=False)
