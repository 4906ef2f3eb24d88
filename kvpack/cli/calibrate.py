"""`kvpack calibrate`: measure a model once, use the result in many exports."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli.budget import Cache, TargetBpw, TargetSize, with_target
from kvpack.cli.experts import expert_lines
from kvpack.cli.options import (
    AllowDownload,
    Data,
    DryRun,
    Force,
    Model,
    OptionalRecipe,
    Output,
    Overrides,
    TrustRemoteCode,
    with_data,
)
from kvpack.cli.plan import plan_result
from kvpack.cli.run import Result, Session
from kvpack.core.access import Access
from kvpack.core.errors import UsageError

if TYPE_CHECKING:
    from kvpack.calibrate.store import Calibration

Sinks = Annotated[
    bool,
    typer.Option(
        "--sinks",
        help="Also measure the model's attention sinks, for kvpack inspect; without --recipe only those.",
    ),
]
_MEASURE = "fragments/measure"


def calibrate(
    session: Session,
    model: Model,
    output: Output,
    recipe: OptionalRecipe = None,
    sinks: Sinks = False,
    data: Data = None,
    overrides: Overrides = None,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    cache: Cache = None,
    force: Force = False,
    dry_run: DryRun = False,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Measure a model on text once; many exports can use the result."""
    from kvpack import pipeline

    if recipe is None and not sinks:
        raise UsageError("nothing to measure", hint="name a --recipe, or pass --sinks")
    access = Access(allow_download, trust_remote_code)
    changes = with_target(with_data(overrides, data), target_bpw, target_size)
    plan = pipeline.make_plan(
        model, recipe or _MEASURE, changes, access, cache=cache, progress=session.progress
    )
    if dry_run:
        return plan_result(plan)
    made = pipeline.calibrate(
        plan, output, sinks=sinks, force=force, access=access, progress=session.progress
    )
    lines = _lines(made, output)
    if sinks:
        lines.append(f"to see the attention sinks: {shlex.join(['kvpack', 'inspect', str(output)])}")
    if recipe is not None:
        lines.append(f"next: {_export_command(model, recipe, changes, output)}")
    return Result(_data(made, output), tuple(lines))


def _data(made: Calibration, output: Path) -> dict[str, Any]:
    errors, worst = made.output_errors, _worst(made)
    return {
        "path": str(output),
        "sha256": made.sha256,
        "tokens": made.manifest["tokens"],
        "solved_layers": len(errors),
        "worst_output_error": None if worst is None else {"linear": worst, "relative": errors[worst]},
        "output_errors": errors,
        "experts": made.experts or None,
    }


def _lines(made: Calibration, output: Path) -> list[str]:
    errors, worst = made.output_errors, _worst(made)
    lines = [f"wrote {output}: {made.manifest['tokens']:,} tokens, {len(errors)} layers solved"]
    if worst is not None:
        lines.append(f"largest relative output error: {errors[worst]:.4f} in {worst}")
    return [*lines, *expert_lines(made.experts)]


def _worst(made: Calibration) -> str | None:
    """The linear layer with the largest output error, if any was solved."""
    return max(made.output_errors, key=lambda name: made.output_errors[name], default=None)


def _export_command(model: str, recipe: str, overrides: list[str], calibration: Path) -> str:
    changes = [word for change in overrides for word in ("--set", change)]
    command = [
        "kvpack",
        "export",
        model,
        "-r",
        recipe,
        *changes,
        "--calibration",
        str(calibration),
        "-o",
        "out/",
    ]
    return shlex.join(command)
