"""`kvpack export`: write the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli.budget import Cache, TargetBpw, TargetSize, with_target
from kvpack.cli.experts import expert_lines
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
    byte_count,
    with_data,
)
from kvpack.cli.plan import plan_result
from kvpack.cli.run import Result, Session
from kvpack.core.access import Access
from kvpack.recipe.plan import Plan
from kvpack.report import human_bytes

if TYPE_CHECKING:
    from kvpack.pipeline import Exported

ShardSize = Annotated[
    str, typer.Option("--shard-size", metavar="SIZE", help="Weights per file, e.g. 4GB or 512MiB.")
]


CalibrationFolder = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FOLDER",
        help="Use what kvpack calibrate wrote; without it, calibrate when the recipe needs it.",
    ),
]


def export(
    session: Session,
    model: Model,
    recipe: RecipeOption,
    output: Output,
    calibration: CalibrationFolder = None,
    data: Data = None,
    overrides: Overrides = None,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    cache: Cache = None,
    force: Force = False,
    dry_run: DryRun = False,
    shard_size: ShardSize = "4GB",
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Write the packed artifact; calibrates first when the recipe needs it."""
    from kvpack import pipeline

    access = Access(allow_download, trust_remote_code)
    shard_bytes = byte_count(shard_size)
    changes = with_target(with_data(overrides, data), target_bpw, target_size)
    plan = pipeline.make_plan(model, recipe, changes, access, cache=cache, progress=session.progress)
    if dry_run:
        return plan_result(plan)
    made = pipeline.export(
        plan,
        output,
        calibration=calibration,
        force=force,
        shard_bytes=shard_bytes,
        access=access,
        progress=session.progress,
    )
    return _result(made, plan)


def _result(made: Exported, plan: Plan) -> Result:
    totals = made.manifest.totals
    experts = (made.manifest.calibration or {}).get("experts")
    found = {
        "path": str(made.path),
        "bytes": made.nbytes,
        "weight_bytes": totals.weight_bytes,
        "planned_weight_bytes": sum(t.nbytes for t in plan.artifact_tensors().values()),
        "bits_per_weight": totals.bits_per_weight,
        "source_bytes": plan.model.nbytes,
        "experts": experts,
        "files": sorted(made.manifest.files),
    }
    weights = f"{human_bytes(totals.weight_bytes)}, {totals.bits_per_weight:.2f} bits per weight"
    lines = (
        f"wrote {made.path}: {human_bytes(made.nbytes)} in {len(made.manifest.files) + 1} files",
        f"weights: {weights}; the source has {human_bytes(plan.model.nbytes)}",
        *expert_lines(experts),
        f'next: kvpack verify {made.path}, or in Python: kvpack.load("{made.path}")',
    )
    return Result(found, lines)
