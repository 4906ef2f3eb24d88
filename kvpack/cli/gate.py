"""The option `--gate`: conditions that decide the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from kvpack.core.errors import CheckFailed
from kvpack.evaluate.gates import METRICS, RECALL_METRICS, Gate, failed_gates
from kvpack.evaluate.scores import Evaluation, RecallEvaluation

Gates = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="CONDITIONS",
        help='Exit with 1 unless they hold, e.g. "ppl_ratio<=1.02,kl<=0.01"; of '
        + ", ".join(METRICS)
        + "; with --task recall of "
        + ", ".join(RECALL_METRICS)
        + ".",
    ),
]


def gate_failure(found: Evaluation | RecallEvaluation, gates: Sequence[Gate]) -> CheckFailed | None:
    """The gates that do not hold, as one error; None where all do."""
    failures = failed_gates(found, gates)
    return CheckFailed("; ".join(failures), hint="the gate was set with --gate") if failures else None
