"""Conditions on an evaluation, for CI: ``ppl_ratio<=1.02,kl<=0.01`` or ``recall>=0.99``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvpack.core.errors import UsageError
from kvpack.evaluate.scores import Evaluation, RecallEvaluation


@dataclass(frozen=True)
class Gate:
    """One condition on a metric: ``kl<=0.01``."""

    metric: str
    operator: Literal["<=", ">="]
    bound: float

    def holds(self, value: float) -> bool:
        """Whether `value` meets the bound; NaN never does."""
        return value <= self.bound if self.operator == "<=" else value >= self.bound


METRICS = ("ppl", "ppl_ratio", "kl", "top1", "weight_bits", "kv_bits")
RECALL_METRICS = ("recall", "recall_loss", "weight_bits", "kv_bits")
_COMPARED = ("ppl_ratio", "kl", "top1", "recall_loss")


def parse_gates(text: str, *, compared: bool = True, metrics: Sequence[str] = METRICS) -> list[Gate]:
    """Read ``"ppl_ratio<=1.02,kl<=0.01"``.

    Args:
        text: conditions, separated by commas.
        compared: whether the evaluation will have a source to compare with.
        metrics: what it will measure.

    Raises:
        UsageError: an unknown metric, no ``<=``/``>=`` with a number, a metric that cannot be
            measured without a source, or no condition at all.
    """
    gates: list[Gate] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        operator: Literal["<=", ">="] = "<=" if "<=" in item else ">="
        metric, found, bound = (part.strip() for part in item.partition(operator))
        if not found or metric not in metrics:
            raise UsageError(
                f"cannot read the gate {item!r}",
                hint=f"write METRIC<=NUMBER or METRIC>=NUMBER, with METRIC one of {', '.join(metrics)}",
            )
        if metric in _COMPARED and not compared:
            raise UsageError(f"gate {item!r} compares with a source", hint="add --source MODEL")
        gates.append(Gate(metric, operator, _number(bound, item)))
    if not gates:
        raise UsageError("the gate is empty", why="it would always pass", hint="for example kl<=0.01")
    return gates


def _number(text: str, item: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UsageError(f"{text!r} in gate {item!r} is not a number", hint="for example kl<=0.01")
    return number


def failed_gates(evaluation: Evaluation | RecallEvaluation, gates: Sequence[Gate]) -> list[str]:
    """One line per gate that does not hold, for any protocol measured."""
    failures = []
    for protocol in evaluation.packed:
        metrics = evaluation.metrics(protocol)
        for gate in gates:
            if gate.metric not in metrics:
                failures.append(f"{gate.metric} was not measured ({protocol})")
            elif not gate.holds(metrics[gate.metric]):
                value = metrics[gate.metric]
                failures.append(
                    f"{protocol}: {gate.metric} is {value:.4g}, not {gate.operator} {gate.bound:g}"
                )
    return failures
