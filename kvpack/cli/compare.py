"""`kvpack compare`: many recipes on one model, and the frontier of bits and quality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.calibrate.recall_text import RecallSettings
from kvpack.cli.budget import Cache, compared_bits
from kvpack.cli.comparison import comparison_data, comparison_lines, protocol_line
from kvpack.cli.options import (
    KV,
    AllowDownload,
    Context,
    Model,
    Overrides,
    Step,
    Text,
    Tokens,
    TrustRemoteCode,
    protocols_of,
)
from kvpack.cli.recall import (
    RecallFacts,
    RecallQuestions,
    RecallSeed,
    RecallTokens,
    Sequences,
    Task,
    is_recall,
)
from kvpack.cli.report_file import ForceReport, Report, check_report, draws_page, write_report
from kvpack.cli.run import Result, Session
from kvpack.core.access import Access
from kvpack.core.errors import Interrupted, KvpackError
from kvpack.evaluate.frontier import Comparison, Entry

if TYPE_CHECKING:
    from kvpack.compare import Job

Recipes = Annotated[
    list[str],
    typer.Option(
        "--recipes",
        "-r",
        metavar="NAMES",
        help="Names, variants, paths or patterns, separated by commas: kivi,kivi@4bit,rotatekv@*. "
        "all: every bundled recipe with a KV-cache scheme; all-weights: those that pack weights. Repeatable.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget-bits", min=0.01, help="Mark who needs at most this many KV bits per element, and the best."
    ),
]

Compared = Annotated[
    str,
    typer.Option(
        "--axis",
        metavar="kv|weights",
        help="Which bits to compare. weights: stored bits per weight, scored by a plain forward.",
    ),
]
TargetBpws = Annotated[
    str | None,
    typer.Option(
        "--target-bpw",
        metavar="LIST",
        help="With --axis weights: make every recipe for each of these bits per parameter, everything "
        "counted, such as 2.5,3,4.",
    ),
]
PackedBpws = Annotated[
    str | None,
    typer.Option(
        "--packed-bpw",
        metavar="LIST",
        help="The same with bits of the packed layers only, whatever embedding and head take.",
    ),
]


Beside = Annotated[
    list[str] | None,
    typer.Option(
        "--beside",
        metavar="NAMES",
        help="With targets: recipes to measure as they are, at their own bits. Repeatable.",
    ),
]


def compare(
    session: Session,
    model: Model,
    recipes: Recipes,
    budget_bits: Budget = None,
    axis: Compared = "kv",
    target_bpw: TargetBpws = None,
    packed_bpw: PackedBpws = None,
    beside: Beside = None,
    cache: Cache = None,
    data: Text = "builtin:stdlib",
    overrides: Overrides = None,
    context: Context = 512,
    max_tokens: Tokens = 4096,
    kv: KV = "both",
    step: Step = None,
    task: Task = "text",
    recall_tokens: RecallTokens = 1024,
    recall_facts: RecallFacts = 16,
    recall_questions: RecallQuestions = None,
    sequences: Sequences = 32,
    recall_seed: RecallSeed = 0,
    report: Report = None,
    force: ForceReport = False,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Measure many recipes on the same text or task: calibrates once, marks the frontier, draws it."""
    from kvpack.compare import Job
    from kvpack.evaluate.artifact import EvaluationSettings

    check_report(report, force)
    settings = EvaluationSettings(data, context, max_tokens, step, protocols=protocols_of(kv))
    size = RecallSettings(recall_tokens, recall_facts, recall_questions, sequences, recall_seed)
    recall = size if is_recall(task, data) else None
    bits, targets = compared_bits(axis, target_bpw, packed_bpw, recall is not None)
    sinks = draws_page(report) and bits == "kv"
    job = Job(model, _split(recipes), overrides or (), budget_bits, settings, recall, sinks)
    job = replace(job, axis=bits, targets=targets, cache=cache, beside=_split(beside or []))
    return _compared(session, job, report, Access(allow_download, trust_remote_code))


def _compared(session: Session, job: Job, report: Path | None, access: Access) -> Result:
    """Do the job, saying what is found as it is found."""
    from kvpack.compare import compare as run

    def found(entry: Entry) -> None:
        session.progress.say(_finished(entry))

    made = run(job, access=access, found=found, progress=session.progress)
    written = write_report(report, made)
    return Result(comparison_data(made), (*comparison_lines(made), *written), _failure(made))


def _split(items: list[str]) -> list[str]:
    """Single references; a path with a comma in its name stays whole."""
    names = [n for item in items for n in ([item] if _exists(item) else item.split(","))]
    return [name.strip() for name in names if name.strip()]


def _exists(text: str) -> bool:
    """Whether there is a file of that name; a list of names may be longer than a name can be."""
    try:
        return Path(text).exists()
    except OSError:
        return False


def _failure(made: Comparison) -> KvpackError | None:
    if made.missing:
        left = f"{len(made.missing)} recipes were not measured: {', '.join(made.missing)}"
        return Interrupted(f"interrupted; {left}", hint="run it again with these")
    bugs = [entry for entry in made.entries if entry.bug]
    if bugs:
        return KvpackError(
            f"internal error in {bugs[0].recipe}: {bugs[0].reason}",
            hint=f"this is a bug in kvpack; kvpack export {made.model} -r {bugs[0].recipe} -o out/ "
            "--traceback may show where",
        )
    return None


def _finished(entry: Entry) -> str:
    """One line about a recipe, as soon as it is done."""
    if entry.evaluation is None:
        return f"{entry.recipe}: {entry.reason}"
    said = "; ".join(protocol_line(entry.evaluation, name) for name in entry.evaluation.packed)
    return f"{entry.recipe}: {said} ({entry.seconds:.1f} s)"
