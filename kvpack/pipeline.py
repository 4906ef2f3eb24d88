"""The stages of the main job, in order; each function is one command. Readable top to bottom.

plan -> scan -> calibrate -> pack and write -> check what was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvpack.artifact.manifest import Manifest
from kvpack.core.access import CLOSED, Access
from kvpack.core.errors import KvpackError, UsageError
from kvpack.core.memory import return_large_blocks
from kvpack.core.progress import SILENT, Progress, paced
from kvpack.model_card import model_card
from kvpack.recipe.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from kvpack.artifact.writer import ArtifactWriter
    from kvpack.calibrate.data import Samples
    from kvpack.calibrate.store import Calibration

SHARD_BYTES = 4_000_000_000
"""Weight bytes per file of an artifact."""


@dataclass(frozen=True)
class Exported:
    """A finished artifact. `calibration` is the folder that was used, None when none was needed."""

    path: Path
    manifest: Manifest
    nbytes: int


def make_plan(
    model: str | Path,
    recipe: str,
    overrides: Sequence[str] = (),
    access: Access = CLOSED,
    *,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Apply a recipe to a model: what would be written, to the byte.

    Reads headers only, unless the recipe has a budget to spend (`kvpack.calibrate.budget`); what is
    measured for it is kept in the folder `cache`, by default `kvpack.core.cache_dir`.

    Raises:
        RecipeError: the recipe is wrong, or asks for what this model cannot do.
        SourceError: the model is incomplete or unknown.
    """
    from kvpack.recipe.load import load

    loaded = load(recipe, overrides)  # before torch is imported: a typo is answered at once
    from kvpack.models import open_model
    from kvpack.recipe.resolve import resolve

    spec = open_model(model, allow_download=access.allow_download, trust_remote_code=access.trust_remote_code)
    plan = resolve(loaded, spec)
    if loaded.recipe.budget is None or not loaded.recipe.budget.open:
        return plan
    from kvpack.calibrate.budget import spend_budget

    return spend_budget(plan, spec, cache=cache, access=access, progress=progress)


def calibrate(
    plan: Plan,
    out: Path,
    *,
    sinks: bool = False,
    force: bool = False,
    access: Access = CLOSED,
    progress: Progress = SILENT,
) -> Calibration:
    """Measure the model on the recipe's text and write a reusable calibration folder.

    With `sinks`, it also holds a report of the source's attention sinks (`kvpack.calibrate.sinks`).

    Raises:
        SourceError: the weights hold NaN or Inf, or a shard is damaged.
        UsageError: `out` exists, or the text is missing or too short.
    """
    from kvpack.core.atomic import check_free
    from kvpack.models.scan import scan

    return_large_blocks()
    check_free(out, force=force)
    hashes = scan(plan.model, progress)
    extra = measure_sinks(plan, access, progress) if sinks else {}
    return _calibrate(plan, out, hashes, force, access, progress, extra)


def measure_sinks(plan: Plan, access: Access, progress: Progress) -> dict[str, bytes]:
    """The report of attention sinks, by file name, on the recipe's text."""
    from kvpack.calibrate.data import open_data
    from kvpack.calibrate.sinks import FILE, sink_report, to_json
    from kvpack.models.tokenizer import load_tokenizer

    recipe = plan.recipe.recipe.calibration
    tokenizer = load_tokenizer(plan.model, trust_remote_code=access.trust_remote_code)
    sampler = open_data(recipe.data, tokenizer, allow_download=access.allow_download)

    def draw(samples: int, tokens: int) -> Tensor:
        try:
            return sampler(samples, tokens, recipe.seed).tokens
        except UsageError as error:
            raise UsageError(error.what, why="sinks need own samples", hint="give more text") from error

    report = sink_report(plan.model, draw, trust_remote_code=access.trust_remote_code, progress=progress)
    for entry in (*report["later_tokens"], *report["long"]["later_tokens"]):
        entry["text"] = tokenizer.decode([entry["token"]])
    return {FILE: to_json(report)}


def _calibrate(
    plan: Plan,
    out: Path,
    hashes: Mapping[str, str],
    force: bool,
    access: Access,
    progress: Progress,
    extra: Mapping[str, bytes] | None = None,
) -> Calibration:
    from kvpack.calibrate.sequential import calibrate as run

    return run(
        plan,
        _samples(plan, access),
        out,
        hashes=hashes,
        extra=extra,
        force=force,
        trust_remote_code=access.trust_remote_code,
        progress=progress,
    )


def calibrate_together(
    plans: Sequence[Plan],
    folder: Path,
    *,
    hashes: Mapping[str, str],
    access: Access = CLOSED,
    progress: Progress = SILENT,
) -> list[Path | KvpackError | None]:
    """Calibrate several plans of one model in as few passes as possible, into folders below `folder`.

    Plans that learn the same share a calibration; those that leave the weights alone and read the
    same text share the passes over it. `hashes` are those of `kvpack.models.scan.scan`.

    Returns:
        Per plan: the calibration's folder, why it failed, or None where none is needed.
    """
    from kvpack.calibrate.shared import calibrate_all

    return_large_blocks()
    return calibrate_all(
        plans,
        folder,
        lambda plan: _samples(plan, access),
        hashes=hashes,
        trust_remote_code=access.trust_remote_code,
        progress=progress,
    )


def _samples(plan: Plan, access: Access) -> Samples:
    from kvpack.calibrate.data import draw
    from kvpack.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(plan.model, trust_remote_code=access.trust_remote_code)
    return draw(plan.recipe.recipe.calibration, tokenizer, allow_download=access.allow_download)


def export(
    plan: Plan,
    out: Path,
    *,
    calibration: Path | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    hashes: Mapping[str, str] | None = None,
    access: Access = CLOSED,
    progress: Progress = SILENT,
) -> Exported:
    """Write the artifact: all of it, or nothing.

    Args:
        plan: from `make_plan`.
        out: the artifact's folder.
        calibration: a folder that `calibrate` wrote for this model and recipe; without it, a
            recipe that needs one calibrates by itself.
        force: replace `out` if it exists.
        shard_bytes: weight bytes per file.
        hashes: what `kvpack.models.scan.scan` found, when the weights have been read already.
        access: what is allowed.
        progress: told about every stage.

    Raises:
        UsageError: `out` exists.
        CalibrationMismatch: the calibration was made for something else.
        SourceError: the weights hold NaN or Inf, or a shard is damaged.
        ResourceError: the disk is too small; nothing was changed.
    """
    from kvpack.artifact.writer import ArtifactWriter
    from kvpack.models.scan import scan

    return_large_blocks()
    planned = sum(spec.nbytes for spec in plan.artifact_tensors().values())
    given = None if calibration is None else _open_calibration(calibration, plan)
    with ArtifactWriter(out, force=force, planned_bytes=planned) as writer:
        hashes = scan(plan.model, progress) if hashes is None else hashes
        with _calibrated(plan, given, hashes, writer, access, progress) as measured:
            manifest = _write(plan, measured, hashes, writer, shard_bytes, progress)
        # Only now: the calibration made on the way must be gone when the folder gets its name.
        manifest = writer.finish(manifest)
    return Exported(out, manifest, sum(f.stat().st_size for f in out.rglob("*") if f.is_file()))


def _open_calibration(path: Path, plan: Plan) -> Calibration:
    """Open a calibration and compare all but the weights, which takes no time."""
    from kvpack.calibrate.store import Calibration

    calibration = Calibration.open(path)
    calibration.matches(plan, calibration.model_files)
    return calibration


@contextmanager
def _calibrated(
    plan: Plan,
    given: Calibration | None,
    hashes: Mapping[str, str],
    writer: ArtifactWriter,
    access: Access,
    progress: Progress,
) -> Iterator[Calibration | None]:
    """The calibration to export with: the given one if it fits, a fresh one if one is needed."""
    from kvpack.calibrate.identity import needs_calibration

    if given is not None:
        given.matches(plan, hashes)  # before the text is read: names what differs at once
        given.matches(plan, hashes, _samples(plan, access).tokens_sha256)
        yield given
    elif needs_calibration(plan):
        with writer.workspace() as scratch:
            yield _calibrate(plan, scratch / "calibration", hashes, False, access, progress)
    else:
        yield None


def _write(
    plan: Plan,
    calibration: Calibration | None,
    hashes: Mapping[str, str],
    writer: ArtifactWriter,
    shard_bytes: int,
    progress: Progress,
) -> Manifest:
    from kvpack.artifact.from_plan import config_of, manifest_of
    from kvpack.artifact.source_files import sidecar_files
    from kvpack.packing import Packing

    packing = Packing(plan, calibration)
    specs = plan.artifact_tensors()
    writer.begin_weights(specs, shard_bytes, plan.recipe.recipe.storage, plan.packed_tensors())
    tell, source, read = paced(progress, "export", len(specs), "MB/s of source"), plan.source_bytes(), 0.0
    for done, (name, tensor) in enumerate(packing.tensors()):
        tell(done, read, name)
        writer.write_tensor(name, tensor)
        read += source.get(name, 0) / 1e6
    tell(len(specs), read)
    writer.write_kv_state(plan.kv_state_tensors(), packing.kv_states())
    writer.write_json("config.json", config_of(plan))
    for name, path in sidecar_files(plan.model.path).items():
        writer.copy_file(path, name)
    stored = sum(record.nbytes for record in writer.written().tensors.values())
    writer.write_text("README.md", model_card(plan, stored))
    return manifest_of(
        plan,
        writer.written(),
        source_hashes=hashes,
        relative_errors=packing.relative_errors,
        sparsity=packing.sparsity(),
        calibration=None if calibration is None else calibration.origin,
    )
