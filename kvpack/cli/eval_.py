"""`kvpack eval`: quality of an artifact beside its source, with gates for CI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.calibrate.recall_text import RecallSettings
from kvpack.cli.console import table
from kvpack.cli.gate import Gates, gate_failure
from kvpack.cli.options import (
    KV,
    AllowDownload,
    Artifact,
    Context,
    Source,
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
    recall_result,
)
from kvpack.cli.report_file import ForceReport, Report, check_report, write_report
from kvpack.cli.run import Result, Session
from kvpack.cli.sparsity import activity_lines
from kvpack.core.access import Access
from kvpack.core.types import ITEM_BYTES
from kvpack.evaluate.cells import subject
from kvpack.evaluate.frontier import Comparison, Entry
from kvpack.evaluate.gates import parse_gates
from kvpack.evaluate.scores import Evaluation, Scores
from kvpack.report import human_bytes

if TYPE_CHECKING:
    from kvpack.evaluate.artifact import EvaluationSettings


def eval_(
    session: Session,
    path: Artifact,
    source: Source = None,
    data: Text = "builtin:stdlib",
    gate: Gates = None,
    kv: KV = "both",
    context: Context = 512,
    max_tokens: Tokens = 4096,
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
    """Measure perplexity, or recall of facts; with --source also KL divergence and top-1 agreement."""
    from kvpack.evaluate.artifact import EvaluationSettings

    protocols = protocols_of(kv)
    access = Access(allow_download, trust_remote_code)
    if is_recall(task, data, report):
        size = RecallSettings(recall_tokens, recall_facts, recall_questions, sequences, recall_seed)
        return recall_result(session, Path(path), source, size, gate, protocols, step, access)
    check_report(report, force)
    settings = EvaluationSettings(data, context, max_tokens, step, protocols=protocols)
    return _text_result(session, Path(path), source, settings, gate, report, access)


def _text_result(
    session: Session,
    path: Path,
    source: str | None,
    settings: EvaluationSettings,
    gate: str | None,
    report: Path | None,
    access: Access,
) -> Result:
    """Score an artifact on a text, and its source where there is one; draw it if that is wanted."""
    gates = [] if gate is None else parse_gates(gate, compared=source is not None)
    from kvpack.evaluate.artifact import evaluate

    found = evaluate(path, source, settings, access=access, progress=session.progress)
    written = () if report is None else write_report(report, _alone(path, source, found))
    failure = gate_failure(found, gates)
    return Result(evaluation_data(found), (*evaluation_lines(found), *written), failure)


def _alone(path: Path, source: str | None, found: Evaluation) -> Comparison:
    """One artifact beside its source, as a comparison with one entry."""
    from kvpack.artifact.reader import read_manifest

    manifest = read_manifest(path)
    name = manifest.recipe.name + (f"@{manifest.recipe.variant}" if manifest.recipe.variant else "")
    bits = 8 * ITEM_BYTES[manifest.base_model.dtype]
    return Comparison(source or str(path), (Entry(name, found),), bits)


def evaluation_data(found: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON data, with the metrics that gates see."""
    return {
        "text": found.text,
        "tokens": found.tokens,
        "context_tokens": found.context_tokens,
        "step_tokens": found.step_tokens,
        "source": found.source,
        "packed": {name: found.metrics(name) for name in found.packed},
        "kv_bits_per_element": found.kv_bits_per_element,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "bits_per_weight": found.bits_per_weight,
        "layer_errors": found.layer_errors,
        "retrieval": found.retrieval,
        "sparse_activations": found.activity or None,
    }


def evaluation_lines(found: Evaluation) -> list[Any]:
    """An evaluation for people: the source first, then the artifact per protocol."""
    rows = [] if found.source is None else [_row("source", found.source, found)]
    rows += [_row(f"packed, {name}", scores, found) for name, scores in found.packed.items()]
    columns = ("", "perplexity", "ratio", "KL", "top-1")
    lines: list[Any] = [
        subject(found),
        table(columns, rows, right=columns[1:]),
        f"weights: {found.bits_per_weight:.2f} bits each, everything counted",
    ]
    if found.kv_bits_per_element is not None and found.kv_bytes_per_token is not None:
        held = f"{human_bytes(found.kv_bytes_per_token)} per token, measured after each chunk"
        lines.append(f"KV cache: {found.kv_bits_per_element:.2f} bits per element, {held}")
    if found.activity:
        lines += ["every token is scored sparse, those of prompts too", *activity_lines(found.activity)]
    if found.retrieval is not None:
        recall = ", ".join(f"{r:.1%} at {share}" for share, r in found.retrieval.recall.items())
        read = f"{found.retrieval.read:.1%} of the tokens per head, {found.retrieval.fetched:.1%} per KV head"
        lines += [f"retrieval: reads {read}", f"recall of the index: {recall}"]
    return lines


def _row(name: str, scores: Scores, found: Evaluation) -> tuple[str, ...]:
    ratio = "" if found.source is None else f"{scores.perplexity / found.source.perplexity:.4f}"
    kl = "" if scores.kl is None else f"{scores.kl:.5f}"
    top1 = "" if scores.top1 is None else f"{scores.top1:.1%}"
    return (name, f"{scores.perplexity:.3f}", ratio, kl, top1)
