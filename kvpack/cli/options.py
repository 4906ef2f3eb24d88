"""Arguments that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

RecipeReference = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A file, or a bundled recipe's name; NAME@VARIANT.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any key of the recipe.")
]
AllowDownload = Annotated[
    bool, typer.Option("--allow-download", help="Fetch from the Hugging Face hub what is not cached.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let transformers run code from the model's folder.")
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, or Hugging Face hub id[@revision].")]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that kvpack export wrote.")]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", metavar="RECIPE", help="A file, or a bundled recipe's name.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at the output path.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write; must not exist.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Calibration text: builtin:NAME, a file, or hf:DATASET; calibration.data."),
]


def with_data(overrides: list[str] | None, data: str | None) -> list[str]:
    """Overrides of `--set`, then those of `--data`: a flag wins."""
    return [*(overrides or []), *([] if data is None else [f"calibration.data={json.dumps(data)}"])]
