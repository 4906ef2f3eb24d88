"""`kvpack recipes list | show | validate | schema`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from kvpack.cli.console import table
from kvpack.cli.options import AllowDownload, Overrides, RecipeReference
from kvpack.cli.run import Result, Session
from kvpack.core.errors import RecipeError
from kvpack.recipe.fitting import needs_data
from kvpack.recipe.load import load, variants
from kvpack.recipe.locate import bundled, split_variant
from kvpack.recipe.recipe import LoadedRecipe
from kvpack.recipe.reference_shape import REFERENCE_SHAPE
from kvpack.report import ReferenceBits, reference_bits


def recipes_list(session: Session) -> Result:
    """List the bundled recipes: paper, fidelity, stored bits."""
    rows = [_row(name) for name in bundled() if not name.startswith("fragments/")]
    notes = (
        "",
        "Stored bits per element, everything counted, at this shape:",
        f"{REFERENCE_SHAPE}.",
        "Variants, and why a recipe is refused at this shape: kvpack recipes show NAME --bits",
    )
    return Result({"shape": REFERENCE_SHAPE, "recipes": rows}, (*_listed(rows), *notes))


def recipes_show(
    session: Session,
    reference: RecipeReference,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="As it is used: extends, variant, --set and defaults applied.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="List every value with the file and line that set it.")
    ] = False,
    bits: Annotated[
        bool, typer.Option("--bits", help="List what the recipe and each of its variants store, in bits.")
    ] = False,
    overrides: Overrides = None,
) -> Result:
    """Print a recipe, as its file has it unless an option asks for more."""
    loaded = load(reference, overrides or ())
    counted = list(_bits_rows(reference, overrides or ()))
    data = {
        **_summary(loaded),
        "resolved": loaded.resolved,
        "origins": loaded.origins,
        "shape": REFERENCE_SHAPE,
        "bits": counted,
    }
    if bits:
        return Result(data, tuple(_bits_lines(counted)))
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
        **_bits_data(reference_bits(loaded)),
    }


def _listed(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Two lines per recipe, so that summaries stay readable beside the numbers."""
    cells = [("name", "paper", "fidelity", "needs data", "KV bits", "weight bits")]
    for row in rows:
        needs = "yes" if row["needs_data"] else "no"
        shown = _bits_text(row["kv_bits"]), _bits_text(row["weight_bits"])
        cells.append((row["name"], row["paper"] or "-", row["fidelity"] or "-", needs, *shown))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line, summary in zip(cells, ["", *(row["summary"] for row in rows)], strict=True):
        texts = (text.ljust(width) for text, width in zip(line[:4], widths[:4], strict=True))
        numbers = (text.rjust(width) for text, width in zip(line[4:], widths[4:], strict=True))
        yield "  ".join((*texts, *numbers))
        if summary:
            yield f"    {summary}"


def _bits_rows(reference: str, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A recipe and its variants under the same overrides."""
    name = split_variant(reference)[0]
    for variant in (None, *variants(name)):
        label = name if variant is None else f"{name}@{variant}"
        try:
            counted = reference_bits(load(label, overrides))
        except RecipeError as error:
            counted = ReferenceBits(refused=error.message)
        yield {"recipe": label, "variant": variant, **_bits_data(counted)}


def _bits_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    numbers = ("KV bits", "weight bits")
    shown = [(r["recipe"], _bits_text(r["kv_bits"]), _bits_text(r["weight_bits"])) for r in rows]
    yield table(("recipe", *numbers), shown, right=numbers)
    yield f"\nStored bits per element, everything counted, at this shape:\n{REFERENCE_SHAPE}."
    yield from (f"{row['recipe']} is refused there: {row['refused']}" for row in rows if row["refused"])


def _bits_data(counted: ReferenceBits) -> dict[str, Any]:
    return {"kv_bits": counted.kv, "weight_bits": counted.weights, "refused": counted.refused}


def _bits_text(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.2f}"


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
