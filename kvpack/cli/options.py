"""Arguments that several commands share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.core.errors import UsageError

if TYPE_CHECKING:
    from kvpack.evaluate.protocols import Protocol

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
OptionalRecipe = Annotated[str | None, typer.Option("--recipe", "-r", metavar="RECIPE", help=_RECIPE_HELP)]
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
        help="Calibration text: builtin:stdlib, a .txt, .jsonl or .parquet file, hf:DATASET, or "
        "recall:TOKENS (sequences of the recall task, for models with the vocabulary of recall-1m); "
        "short for --set calibration.data=TEXT.",
    ),
]

Source = Annotated[
    str | None,
    typer.Option(
        "--source", metavar="MODEL", help="The uncompressed model to compare with: folder or hub id."
    ),
]
Tokens = Annotated[
    int, typer.Option("--max-tokens", min=2, help="Tokens to score; the last chunk is finished.")
]
Context = Annotated[
    int, typer.Option("--context", min=2, help="Tokens per chunk, at most what the model was made for.")
]
Step = Annotated[
    int | None,
    typer.Option(
        "--step", min=1, help="Tokens per step in decode; by default the most that scores as single steps do."
    ),
]
Text = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="TEXT",
        help="Text to score: builtin:stdlib, a .txt, .jsonl or .parquet file, or hf:DATASET.",
    ),
]
KV = Annotated[
    str,
    typer.Option(
        "--kv",
        metavar="both|prefill|decode",
        help="How the compressed cache takes part. prefill: one forward, every full token block encoded; "
        "decode: step by step as in generation, recent tokens exact.",
    ),
]

MaxSlowdown = Annotated[
    str | None,
    typer.Option(
        "--max-slowdown",
        metavar="SHARE",
        help="Keep layers losslessly coded in memory while a token takes at most this much longer, such "
        "as 5%; measured on this machine.",
    ),
]
MaxWeightMemory = Annotated[
    str | None,
    typer.Option(
        "--max-weight-memory",
        metavar="SIZE",
        help="Keep layers losslessly coded in memory so that all weights take at most this, such as 200MB.",
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


def share(text: str) -> float:
    """`"5%"` -> 0.05; a plain number is the share itself.

    Raises:
        UsageError: no number, or a negative one.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(%?)", text.strip())
    if not found:
        raise UsageError(f"cannot read the share {text!r}", hint="write for example 5% or 0.05")
    return float(found[1]) / (100 if found[2] else 1)


def with_data(overrides: list[str] | None, data: str | None) -> list[str]:
    """Overrides of `--set`, then those of `--data`: a flag wins."""
    return [*(overrides or []), *([] if data is None else [f"calibration.data={json.dumps(data)}"])]


def protocols_of(kv: str) -> tuple[Protocol, ...]:
    """The protocols that `--kv` names.

    Raises:
        UsageError: it names none.
    """
    from kvpack.evaluate.protocols import PROTOCOLS

    if kv not in ("both", *PROTOCOLS):
        raise UsageError(f"--kv cannot be {kv!r}", hint=f"use both, {' or '.join(PROTOCOLS)}")
    return tuple(p for p in PROTOCOLS if kv in ("both", p))
