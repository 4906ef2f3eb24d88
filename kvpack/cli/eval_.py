"""`kvpack eval`: quality of an artifact beside its source, with gates for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli.console import table
from kvpack.cli.options import AllowDownload, Artifact, Source, TrustRemoteCode
from kvpack.cli.run import Result, Session
from kvpack.core.access import Access
from kvpack.core.errors import CheckFailed, UsageError
from kvpack.evaluate.gates import METRICS, failed_gates, parse_gates
from kvpack.evaluate.scores import Evaluation, Scores
from kvpack.report import human_bytes

Tokens = Annotated[
    int, typer.Option("--max-tokens", min=2, help="Tokens to score; the last chunk is finished.")
]
Context = Annotated[
    int, typer.Option("--context", min=2, help="Tokens per chunk, at most what the model was made for.")
]
Step = Annotated[
    int | None,
    typer.Option(
        "--step", min=1, help="Tokens per step in decode; by default the most that scores as single steps do."
    ),
]
KV = Annotated[
    str,
    typer.Option(
        "--kv",
        metavar="both|prefill|decode",
        help="How the compressed cache takes part. prefill: one forward, every full token block encoded; "
        "decode: step by step as in generation, recent tokens exact.",
    ),
]

Text = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="TEXT",
        help="Text to score: builtin:stdlib, a .txt, .jsonl or .parquet file, or hf:DATASET.",
    ),
]
Gates = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="CONDITIONS",
        help='Exit with 1 unless they hold, e.g. "ppl_ratio<=1.02,kl<=0.01"; of ' + ", ".join(METRICS) + ".",
    ),
]


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
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Measure perplexity; with --source also KL divergence and top-1 agreement."""
    from kvpack.evaluate.artifact import EvaluationSettings, evaluate
    from kvpack.evaluate.protocols import PROTOCOLS

    gates = [] if gate is None else parse_gates(gate, compared=source is not None)
    if kv not in ("both", *PROTOCOLS):
        raise UsageError(f"--kv cannot be {kv!r}", hint=f"use both, {' or '.join(PROTOCOLS)}")
    settings = EvaluationSettings(
        data=data,
        context_tokens=context,
        max_tokens=max_tokens,
        step_tokens=step,
        protocols=tuple(p for p in PROTOCOLS if kv in ("both", p)),
    )
    found = evaluate(
        Path(path),
        source,
        settings,
        access=Access(allow_download, trust_remote_code),
        progress=session.progress,
    )
    failures = failed_gates(found, gates)
    failure = CheckFailed("; ".join(failures), hint="the gate was set with --gate") if failures else None
    return Result(evaluation_data(found), tuple(evaluation_lines(found)), failure)


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
    }


def evaluation_lines(found: Evaluation) -> list[Any]:
    """An evaluation for people: the source first, then the artifact per protocol."""
    rows = [] if found.source is None else [_row("source", found.source, found)]
    rows += [_row(f"packed, {name}", scores, found) for name, scores in found.packed.items()]
    columns = ("", "perplexity", "ratio", "KL", "top-1")
    lines: list[Any] = [
        f"{found.tokens:,} tokens of {found.text}, chunks of {found.context_tokens}",
        table(columns, rows, right=columns[1:]),
        f"weights: {found.bits_per_weight:.2f} bits each, everything counted",
    ]
    if found.kv_bits_per_element is not None and found.kv_bytes_per_token is not None:
        held = f"{human_bytes(found.kv_bytes_per_token)} per token, measured after each chunk"
        lines.append(f"KV cache: {found.kv_bits_per_element:.2f} bits per element, {held}")
    return lines


def _row(name: str, scores: Scores, found: Evaluation) -> tuple[str, ...]:
    ratio = "" if found.source is None else f"{scores.perplexity / found.source.perplexity:.4f}"
    kl = "" if scores.kl is None else f"{scores.kl:.5f}"
    top1 = "" if scores.top1 is None else f"{scores.top1:.1%}"
    return (name, f"{scores.perplexity:.3f}", ratio, kl, top1)
