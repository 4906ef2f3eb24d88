"""`kvpack calibrate`: measure a model once, use the result in many exports."""

from __future__ import annotations

import shlex

from kvpack.cli.options import (
    AllowDownload,
    Data,
    DryRun,
    Force,
    Model,
    Output,
    Overrides,
    RecipeOption,
    TrustRemoteCode,
    with_data,
)
from kvpack.cli.plan import plan_result
from kvpack.cli.run import Result, Session
from kvpack.core.access import Access


def calibrate(
    session: Session,
    model: Model,
    recipe: RecipeOption,
    output: Output,
    data: Data = None,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Measure a model on text once; many exports can use the result."""
    from kvpack import pipeline

    access = Access(allow_download, trust_remote_code)
    plan = pipeline.make_plan(model, recipe, with_data(overrides, data), access)
    if dry_run:
        return plan_result(plan)
    made = pipeline.calibrate(plan, output, force=force, access=access, progress=session.progress)
    errors = made.output_errors
    worst = max(errors, key=lambda name: errors[name], default=None)
    found = {
        "path": str(output),
        "sha256": made.sha256,
        "tokens": made.manifest["tokens"],
        "solved_layers": len(errors),
        "worst_output_error": None if worst is None else {"linear": worst, "relative": errors[worst]},
        "output_errors": errors,
    }
    lines = [f"wrote {output}: {found['tokens']:,} tokens, {len(errors)} layers solved"]
    if worst is not None:
        lines.append(f"largest relative output error: {errors[worst]:.4f} in {worst}")
    changes = [word for change in with_data(overrides, data) for word in ("--set", change)]
    command = ["kvpack", "export", model, "-r", recipe, *changes, "--calibration", str(output), "-o", "out/"]
    return Result(found, (*lines, f"next: {shlex.join(command)}"))
