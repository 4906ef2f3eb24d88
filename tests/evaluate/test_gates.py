"""Conditions on an evaluation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kvpack.core.errors import UsageError
from kvpack.evaluate.gates import METRICS, Gate, failed_gates, parse_gates
from kvpack.evaluate.scores import Evaluation, Scores

FOUND = Evaluation(
    text="t", tokens=10, context_tokens=10, step_tokens=1,
    packed={"prefill": Scores(12.0, 0.2, 0.8), "decode": Scores(11.0, 0.1, 0.9)},
    bits_per_weight=4.5, source=Scores(10.0), kv_bits_per_element=3.5, kv_bytes_per_token=100.0,
)  # fmt: skip
WORST = {"ppl": 12.0, "ppl_ratio": 1.2, "kl": 0.2, "top1": 0.8, "weight_bits": 4.5, "kv_bits": 3.5}


def test_spelling() -> None:
    gates = parse_gates(" ppl_ratio <= 1.02, kl<=1e-2 ,top1>=.9")
    assert gates == [Gate("ppl_ratio", "<=", 1.02), Gate("kl", "<=", 0.01), Gate("top1", ">=", 0.9)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl", "cannot read the gate 'kl'"),
        ("kl<0.1", "cannot read the gate"),
        ("kl=0.1", "cannot read the gate"),
        ("klx<=0.1", "cannot read the gate"),
        ("<=0.1", "cannot read the gate"),
        ("ppl<=1,,kl==3", "cannot read the gate 'kl==3'"),
        ("kl<=", "'' in gate 'kl<=' is not a number"),
        ("kl<=small", "'small' in gate"),
        ("kl<=0.1<=0.2", "'0.1<=0.2' in gate"),
        ("kl<=nan", "'nan' in gate"),
        ("", "the gate is empty"),
        (" , ", "the gate is empty"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_gates(text)


@pytest.mark.parametrize("metric", ["ppl_ratio", "kl", "top1"])
def test_comparisons_need_a_source(metric: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gates(f"{metric}<=1", compared=False)
    assert "--source" in caught.value.hint


def test_what_needs_no_source_is_read_without_one() -> None:
    assert len(parse_gates("ppl<=9,weight_bits<=5,kv_bits<=4", compared=False)) == 3


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_passes_at_its_worst_value_and_fails_beyond(metric: str) -> None:
    operator, step = (">=", 1e-6) if metric == "top1" else ("<=", -1e-6)
    worst = WORST[metric]
    assert failed_gates(FOUND, parse_gates(f"{metric}{operator}{worst}")) == []
    failures = failed_gates(FOUND, parse_gates(f"{metric}{operator}{worst + step:.8f}"))
    protocols = 2 if metric in ("weight_bits", "kv_bits") else 1
    assert len(failures) == protocols
    assert failures[0].startswith(f"prefill: {metric} is ")


@pytest.mark.parametrize("operator", ["<=", ">="])
def test_nan_never_passes(operator: str) -> None:
    broken = replace(FOUND, packed={"decode": Scores(math.nan, math.nan, math.nan)})
    for metric in ("ppl", "ppl_ratio", "kl", "top1"):
        bound = "inf" if operator == "<=" else "-inf"
        assert len(failed_gates(broken, parse_gates(f"{metric}{operator}{bound}"))) == 1


def test_what_was_not_measured_fails() -> None:
    weights_only = replace(FOUND, kv_bits_per_element=None)
    assert failed_gates(weights_only, parse_gates("kv_bits<=16")) == [
        "kv_bits was not measured (prefill)",
        "kv_bits was not measured (decode)",
    ]
