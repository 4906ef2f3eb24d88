"""`kvpack eval --task recall`: how many facts of its prompt a model can repeat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.calibrate.recall_text import RecallSettings
from kvpack.cli.console import table
from kvpack.cli.gate import gate_failure
from kvpack.cli.run import Result, Session
from kvpack.core.access import Access
from kvpack.core.errors import UsageError
from kvpack.evaluate.cells import subject
from kvpack.evaluate.gates import RECALL_METRICS, parse_gates
from kvpack.evaluate.scores import RecallEvaluation

TASKS = ("text", "recall")
Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="text|recall",
        help="What to score. text: prediction of --data; recall: facts scattered among filler words, "
        "asked again at the end (for models with the vocabulary of recall-1m).",
    ),
]
RecallTokens = Annotated[
    int, typer.Option("--recall-tokens", min=8, help="Tokens per sequence of the recall task.")
]
RecallFacts = Annotated[int, typer.Option("--recall-facts", min=1, help="Facts per sequence.")]
RecallQuestions = Annotated[
    int | None,
    typer.Option("--recall-questions", min=1, help="Questions per sequence; by default each fact once."),
]
Sequences = Annotated[int, typer.Option("--sequences", min=1, help="Sequences of the recall task.")]
RecallSeed = Annotated[
    int, typer.Option("--recall-seed", min=0, help="Decides facts, fillers and questions.")
]


def is_recall(task: str, data: str, report: object = None) -> bool:
    """Whether the recall task is asked for; with a `report` where that cannot draw it.

    Raises:
        UsageError: an unknown task, or an option that belongs to the other one.
    """
    if task not in TASKS:
        raise UsageError(f"--task cannot be {task!r}", hint=f"use {' or '.join(TASKS)}")
    if task == "recall" and (data != "builtin:stdlib" or report is not None):
        option = "--report" if report is not None else "--data"
        raise UsageError(f"{option} belongs to --task text", hint="leave it out; recall makes its own text")
    return task == "recall"


def recall_result(
    session: Session,
    path: Path,
    source: str | None,
    settings: RecallSettings,
    gate: str | None,
    protocols: Sequence[Any],
    step: int | None,
    access: Access,
) -> Result:
    """Give the task to an artifact, and to its source where there is one."""
    gates = [] if gate is None else parse_gates(gate, compared=source is not None, metrics=RECALL_METRICS)
    from kvpack.evaluate.recall import evaluate_recall

    found = evaluate_recall(
        path,
        source,
        settings,
        protocols=protocols,
        step_tokens=step,
        access=access,
        progress=session.progress,
    )
    return Result(recall_data(found), tuple(recall_lines(found)), gate_failure(found, gates))


def recall_data(found: RecallEvaluation) -> dict[str, Any]:
    """The evaluation as JSON data, with the metrics that gates see."""
    return {
        "task": "recall",
        "tokens": found.tokens,
        "facts": found.facts,
        "questions": found.questions,
        "sequences": found.sequences,
        "seed": found.seed,
        "source": None if found.source is None else {"recall": found.source},
        "packed": {name: found.metrics(name) for name in found.packed},
        "kv_bits_per_element": found.kv_bits_per_element,
        "bits_per_weight": found.bits_per_weight,
    }


def recall_lines(found: RecallEvaluation) -> list[Any]:
    """The evaluation for people: the source first, then the artifact per protocol."""
    rows = [] if found.source is None else [("source", f"{found.source:.1%}", "")]
    for name, share in found.packed.items():
        loss = "" if found.source is None else f"{100 * (found.source - share):.1f}"
        rows.append((f"packed, {name}", f"{share:.1%}", loss))
    columns = ("", "recall", "points lost")
    lines: list[Any] = [
        subject(found),
        table(columns, rows, right=columns[1:]),
        f"weights: {found.bits_per_weight:.2f} bits each, everything counted",
    ]
    if found.kv_bits_per_element is not None:
        lines.append(f"KV cache: {found.kv_bits_per_element:.2f} bits per element")
    return lines
