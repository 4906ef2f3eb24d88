"""The command tree. Each command is one file; none of them imports torch before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from kvpack import __version__
from kvpack.cli import (
    bench,
    calibrate,
    compare,
    demo,
    doctor,
    eval_,
    export,
    generate,
    inspect_,
    plan,
    recipes,
    verify,
)
from kvpack.cli.run import Result, command, function_name

app = typer.Typer(
    name="kvpack",
    help="Compress language models offline: weights and KV cache, one verified artifact.",
    epilog="For example: kvpack plan MODEL -r rotatekv-w4, then kvpack export MODEL -r rotatekv-w4 -o out/. "
    "kvpack demo needs no model and no network.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_recipes = typer.Typer(help="List, show and check recipes: what to compress, and how.", no_args_is_help=True)

_PANELS: dict[str, tuple[Callable[..., Result], ...]] = {
    "Start here": (demo.demo, plan.plan, calibrate.calibrate, export.export),
    "Look": (inspect_.inspect_,),
    "Check": (verify.verify, eval_.eval_, compare.compare, bench.bench, doctor.doctor),
    "Use": (generate.generate,),
}
_RECIPES = (recipes.recipes_list, recipes.recipes_show, recipes.recipes_validate, recipes.recipes_schema)


def command_names() -> list[str]:
    """Every command as typed."""
    return [function_name(f) for panel in (*_PANELS.values(), _RECIPES) for f in panel]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpack {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress language models offline: weights and KV cache, one verified artifact."""


for _panel, _functions in _PANELS.items():
    for _function in _functions:
        app.command(function_name(_function), rich_help_panel=_panel)(command(_function))
for _function in _RECIPES:
    _recipes.command(function_name(_function).removeprefix("recipes "))(command(_function))
app.add_typer(_recipes, name="recipes", rich_help_panel="Look")
