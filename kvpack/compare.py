"""Many recipes on one model: calibrated together, exported one at a time, scored on one text or task."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.calibrate.recall_text import RecallSettings
from kvpack.calibrate.sinks import FILE
from kvpack.core.access import CLOSED, Access
from kvpack.core.errors import KvpackError, UsageError
from kvpack.core.progress import SILENT, Progress
from kvpack.core.types import ITEM_BYTES
from kvpack.evaluate.artifact import EvaluationSettings, prepare, score
from kvpack.evaluate.frontier import AnyEvaluation, Axis, Comparison, Entry
from kvpack.evaluate.recall import prepare_recall, score_recall
from kvpack.models.scan import scan
from kvpack.pipeline import calibrate_together, export, make_plan, measure_sinks
from kvpack.recipe.load import load, variants
from kvpack.recipe.locate import bundled
from kvpack.recipe.plan import Plan

if TYPE_CHECKING:
    from kvpack.core.model_spec import ModelSpec

Found = Callable[[Entry], None]


@dataclass(frozen=True)
class Job:
    """What to compare.

    `recipes` are names, variants, paths or patterns, see `expand`; `overrides` (``--set``) apply to
    every one of them. With `recall` that task is scored instead of the text of `settings`, whose
    steps, batch and protocols hold for both. With `sinks`, the source's attention sinks are measured
    in the end.

    `axis` is what is compared, see `Comparison.axis`; for weights, caches stay uncompressed. With
    `targets` every recipe is made for each of these bits per weight, spent over its layers by its
    budget (`kvpack.recipe.recipe.BudgetRecipe`); sensitivities are kept in the folder `cache`. Those
    of `beside` are measured as they are.
    """

    model: str
    recipes: Sequence[str]
    overrides: Sequence[str] = ()
    budget_bits: float | None = None
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    recall: RecallSettings | None = None
    sinks: bool = False
    axis: Axis = "kv"
    targets: Sequence[float] = ()
    cache: Path | None = None
    beside: Sequence[str] = ()


def expand(patterns: Sequence[str]) -> list[str]:
    """Recipe references behind names and patterns, in order, each once.

    ``all`` are the bundled recipes with a KV-cache scheme, ``all-weights`` those that pack weights. A
    pattern (``*``, ``?``, ``[...]``)
    without @ is matched against bundled names, one with @ against every NAME@VARIANT.

    Raises:
        UsageError: a pattern matches nothing, or there is none.
        RecipeError: no recipe or variant has that name.
    """
    chosen: list[str] = []
    for pattern in patterns:
        if pattern == "all":
            found = [name for name in _names() if load(name).recipe.kv_cache is not None]
        elif pattern == "all-weights":
            found = [name for name in _names() if load(name).recipe.weights]
        elif any(c in pattern for c in "*?[") and not Path(pattern).exists():
            found = fnmatch.filter(_variants() if "@" in pattern else _names(), pattern)
        else:
            load(pattern)  # a typo is answered at once
            found = [pattern]
        if not found:
            raise UsageError(f"no recipe matches {pattern!r}", hint="kvpack recipes list shows the names")
        chosen += found
    if not chosen:
        raise UsageError("no recipes to compare", hint="for example --recipes kivi,rotatekv@4bit, or all")
    return list(dict.fromkeys(chosen))


def _names() -> list[str]:
    return [name for name in bundled() if not name.startswith("fragments/")]


def _variants() -> list[str]:
    return [f"{name}@{variant}" for name in _names() for variant in variants(name)]


def compare(
    job: Job, *, access: Access = CLOSED, found: Found = lambda entry: None, progress: Progress = SILENT
) -> Comparison:
    """Calibrate once, then export, score and delete one artifact after another.

    Artifacts are real ones, in a temporary folder (`TMPDIR` moves it) that needs room for one of
    them. The source is loaded once. A recipe that does not suit the model becomes an entry with
    its reason, and so does one that hits a bug. An interruption ends the run with what is there.

    Args:
        job: model, recipes, text or task.
        access: what is allowed.
        found: called with every entry as soon as it is known.
        progress: told about calibration, and about all recipes' scoring as one stage.

    Raises:
        UsageError: a pattern without recipes, no text, or a model that does not know the task.
        KvpackError: no recipe could be measured; the first reason.
        KeyboardInterrupt: interrupted before anything was found.
    """
    run = _Run(job, expand(job.recipes), access, found, progress)
    with tempfile.TemporaryDirectory(prefix="kvpack-compare-") as scratch:
        try:
            run.all(Path(scratch))
        except KeyboardInterrupt:
            if not any(entry.evaluation for entry in run.entries):
                raise
    return run.result()


def _targeted(references: Sequence[str], job: Job) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Label, recipe and further overrides of everything that is measured."""
    if not job.targets:
        yield from ((reference, reference, ()) for reference in references)
        return
    if job.beside:
        yield from ((reference, reference, ()) for reference in expand(job.beside))
    counts = "packed" if job.axis == "packed" else "all"
    for reference in references:
        for bits in job.targets:
            aim = ("budget.target_bytes=", f"budget.target_bpw={bits:g}", f"budget.counts={counts}")
            yield f"{reference} {bits:g}", reference, (*aim, "budget.bits=")


class _Run:
    """One comparison: the entries so far."""

    def __init__(
        self, job: Job, references: Sequence[str], access: Access, found: Found, progress: Progress
    ) -> None:
        self.job, self.references = job, list(_targeted(references, job))
        self.access, self.found, self.progress = access, found, progress
        self.entries: list[Entry] = []
        self.errors: list[Exception] = []
        self.sinks: Mapping[str, Any] = {}
        self.model: ModelSpec | None = None

    def all(self, scratch: Path) -> None:
        """Plan, calibrate and score; every reference becomes an entry."""
        plans = self._plans()
        if not plans:
            return
        scored = self._prepared()
        hashes = scan(next(iter(plans.values())).model, self.progress)
        calibrations = self._calibrations(plans, hashes, scratch)
        for index, (name, plan) in enumerate(plans.items()):
            with self._guarded(name):
                started = time.monotonic()
                path = self._exported(plan, calibrations[name], hashes, scratch / "artifact")
                tell = self._as_one_stage(name, index, len(plans))
                self._add(Entry(name, scored(path, tell), seconds=time.monotonic() - started))
            shutil.rmtree(scratch / "artifact", ignore_errors=True)
        if self.job.sinks:
            self.sinks = self._measured_sinks(next(iter(plans.values())))

    def _prepared(self) -> Callable[[Path, Progress], AnyEvaluation]:
        """What scores an artifact; the source is loaded here, and what it alone has to answer is asked."""
        job, settings, access = self.job, self.job.settings, self.access
        if job.recall is None:
            plain = replace(settings, weights_only=job.axis != "kv")
            ground = prepare(job.model, plain, access=access)
            return lambda path, tell: score(path, ground, access=access, progress=tell)
        asked = prepare_recall(job.model, job.recall, batch=settings.batch, access=access)
        return lambda path, tell: score_recall(
            path,
            asked,
            protocols=settings.protocols,
            step_tokens=settings.step_tokens,
            batch=settings.batch,
            access=access,
            progress=tell,
        )

    def _measured_sinks(self, plan: Plan) -> Mapping[str, Any]:
        """A report beside the point: a model whose sinks cannot be measured is compared all the same."""
        try:
            files = measure_sinks(plan, self.access, self.progress)
        except KvpackError:
            return {}
        report: Mapping[str, Any] = json.loads(files[FILE])
        return report

    def _plans(self) -> dict[str, Plan]:
        plans: dict[str, Plan] = {}
        for name, reference, target in self.references:
            with self._guarded(name):
                plans[name] = make_plan(
                    self.job.model,
                    reference,
                    (*self.job.overrides, *target),
                    self.access,
                    cache=self.job.cache,
                    progress=self.progress,
                )
                self.model = plans[name].model
        return plans

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Turn a failure into an entry: hours of other recipes' results are worth more than a clean end."""
        started = time.monotonic()
        try:
            yield
        except Exception as caught:
            expected = isinstance(caught, KvpackError)
            text = caught.message if isinstance(caught, KvpackError) else f"{type(caught).__name__}: {caught}"
            self.errors.append(caught)
            self._add(Entry(name, None, text, time.monotonic() - started, bug=not expected))

    def _add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.found(entry)

    def _calibrations(
        self, plans: Mapping[str, Plan], hashes: Mapping[str, str], scratch: Path
    ) -> dict[str, Path | KvpackError | None]:
        """The calibration folder of every recipe, why there is none, or None where none is needed."""
        made = calibrate_together(
            list(plans.values()), scratch, hashes=hashes, access=self.access, progress=self.progress
        )
        return dict(zip(plans, made, strict=True))

    def _exported(
        self, plan: Plan, calibration: Path | KvpackError | None, hashes: Mapping[str, str], out: Path
    ) -> Path:
        if isinstance(calibration, KvpackError):
            raise calibration
        export(plan, out, calibration=calibration, hashes=hashes, access=self.access)
        return out

    def _as_one_stage(self, name: str, index: int, count: int) -> Progress:
        """Scoring of all recipes as one stage, so that its time left is that of the run."""

        def tell(stage: str, done: int, total: int, detail: str = "") -> None:
            self.progress("compare", index * total + done, count * total, name)

        return tell

    def result(self) -> Comparison:
        """What was found.

        Raises:
            Exception: nothing was; the first failure.
        """
        if self.errors and not any(entry.evaluation for entry in self.entries):
            raise self.errors[0]
        bits = 8 * ITEM_BYTES[self.model.dtype] if self.model else 0
        known = {entry.recipe for entry in self.entries}
        missing = tuple(name for name, *_ in self.references if name not in known)
        return Comparison(
            self.job.model,
            tuple(self.entries),
            bits,
            self.job.budget_bits,
            self.sinks,
            missing,
            self.job.axis,
        )
