"""Arguments that several commands share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from kvpack.core.errors import UsageError

_RECIPE_HELP = "A YAML file, or NAME or NAME@VARIANT of kvpack recipes list."
RecipeReference = Annotated[str, typer.Argument(metavar="RECIPE", help=_RECIPE_HELP)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the recipe, e.g. calibration.samples=64; repeatable.",
    ),
]
AllowDownload = Annotated[
    bool, typer.Option("--allow-download", help="Fetch from the Hugging Face hub what is not cached.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let transformers run code from the model's folder.")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, or Hugging Face hub id, or ID@REVISION.")
]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that kvpack export wrote.")]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help=_RECIPE_HELP)]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --output.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write; must not exist without --force."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="TEXT",
        help="Calibration text: builtin:stdlib, a .txt, .jsonl or .parquet file, or hf:DATASET; "
        "short for --set calibration.data=TEXT.",
    ),
]

Source = Annotated[
    str | None,
    typer.Option(
        "--source", metavar="MODEL", help="The uncompressed model to compare with: folder or hub id."
    ),
]
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """`"4GB"` -> 4_000_000_000; kB, MB, GB count in thousands, KiB, MiB, GiB in powers of two.

    Raises:
        UsageError: no number with a unit, or less than a byte.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmg]i?b)", text.strip(), re.IGNORECASE)
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if count < 1:
        raise UsageError(f"cannot read the size {text!r}", hint="write for example 4GB or 512MiB")
    return count


def with_data(overrides: list[str] | None, data: str | None) -> list[str]:
    """Overrides of `--set`, then those of `--data`: a flag wins."""
    return [*(overrides or []), *([] if data is None else [f"calibration.data={json.dumps(data)}"])]
