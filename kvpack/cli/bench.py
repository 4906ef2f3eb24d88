"""`kvpack bench`: speed and memory of an artifact beside its source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvpack.cli.bench_options import (
    Against,
    BenchSource,
    Cold,
    Contexts,
    Dtype,
    Fill,
    Keep,
    Layers,
    NewTokens,
    OptionalArtifact,
    PromptTokens,
    Repeat,
    Seed,
    Steps,
    Synthetic,
    Threads,
    check_choice,
)
from kvpack.cli.bench_picture import bench_page, bench_plot
from kvpack.cli.bench_result import bench_data, bench_lines, measure_line
from kvpack.cli.options import AllowDownload, OptionalRecipe, Overrides, TrustRemoteCode
from kvpack.cli.report_file import ForceReport, Report, check_report, draws_page
from kvpack.cli.run import Result, Session
from kvpack.core.access import Access
from kvpack.core.errors import Interrupted
from kvpack.core.new_file import write_text

if TYPE_CHECKING:
    from kvpack.bench.columns import Column
    from kvpack.bench.result import Bench, Measure
    from kvpack.bench.settings import Settings

_BUSY = 0.1
"""Share of the processors that others may take before a warning."""


def bench(
    session: Session,
    path: OptionalArtifact = None,
    source: BenchSource = None,
    synthetic: Synthetic = None,
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    layers: Layers = None,
    keep: Keep = None,
    against: Against = None,
    context: Contexts = None,
    prompt_tokens: PromptTokens = None,
    new_tokens: NewTokens = 32,
    repeat: Repeat = 5,
    steps: Steps = 8,
    threads: Threads = None,
    dtype: Dtype = "auto",
    fill: Fill = "auto",
    seed: Seed = 0,
    cold: Cold = False,
    report: Report = None,
    force: ForceReport = False,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Measure speed and memory of an artifact beside its source, in turns, a process each."""
    from kvpack.bench.settings import Settings, contexts_of

    of_synthetic = {"--recipe": recipe, "--set": overrides, "--layers": layers, "--keep": keep}
    check_choice(path, source, synthetic, of_synthetic)
    check_report(report, force)
    contexts = contexts_of(context or [])
    sizes = contexts, prompt_tokens or 0, new_tokens, repeat, steps
    chosen = Settings(*sizes, threads, dtype, fill, seed, cold)
    access = Access(allow_download, trust_remote_code)
    with _pair(session, path, source, synthetic, layers, recipe, overrides, keep, seed) as (artifact, model):
        return _measured(session, artifact, model, against, chosen, access, report)


@contextmanager
def _pair(
    session: Session,
    path: Path | None,
    source: str | None,
    synthetic: str | None,
    layers: int | None,
    recipe: str | None,
    overrides: list[str] | None,
    keep: Path | None,
    seed: int,
) -> Iterator[tuple[Path, str | None]]:
    """An artifact and its source, if it has one; those of a shape are made here."""
    if path is not None:
        yield path, source
        return
    from kvpack.bench.prepare import synthetic_pair
    from kvpack.bench.shapes import shape_of

    shape = shape_of(synthetic or "", layers)
    pair = synthetic_pair(
        shape, recipe or "", overrides or (), keep=keep, seed=seed, progress=session.progress
    )
    with pair as (made, artifact):
        yield artifact, str(made)


def _measured(
    session: Session,
    path: Path,
    source: str | None,
    against: str | None,
    settings: Settings,
    access: Access,
    report: Path | None,
) -> Result:
    from kvpack.bench.columns import columns_of
    from kvpack.bench.run import bench as run

    columns: tuple[Column, ...] = columns_of(path, source, against, access)

    def found(measure: Measure) -> None:
        session.progress.say(measure_line(measure, columns))

    made = run(columns, settings, found=found, progress=session.progress)
    _warn(session, made)
    written = _written(report, made)
    failure = None if made.complete else Interrupted("interrupted; not everything was measured")
    return Result(bench_data(made), (*bench_lines(made), *written), failure)


def _written(report: Path | None, made: Bench) -> tuple[str, ...]:
    if report is None:
        return ()
    write_text(report, bench_page(made) if draws_page(report) else bench_plot(made))
    return (f"wrote {report}",)


def _warn(session: Session, made: Bench) -> None:
    """Say what makes the numbers doubtful."""
    others = made.machine.others
    if others is not None and others > _BUSY:
        session.warn(
            f"other programs took {others:.0%} of the processors during the run: times are too long, gains "
            "less affected"
        )
    if made.warm:
        session.warn(
            f"files of {', '.join(made.warm)} could not be dropped from memory, or the system does not tell: "
            "loading may have found them there"
        )
    if not all(told.get("peak_reset") for told in made.described.values()):
        session.warn("this system cannot reset peaks of memory; each includes all that came before it")
