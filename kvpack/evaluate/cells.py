"""Evaluations in words and table cells, the same in the terminal and on the page."""

from __future__ import annotations

from kvpack.evaluate.frontier import AnyEvaluation
from kvpack.evaluate.scores import Evaluation


def subject(found: AnyEvaluation) -> str:
    """What was asked."""
    if isinstance(found, Evaluation):
        return f"{found.tokens:,} tokens of {found.text}, chunks of {found.context_tokens}"
    asked = f"{found.sequences * found.questions:,} questions about {found.facts} facts"
    return f"{asked} in {found.sequences} sequences of {found.tokens:,} tokens"


def headings(found: AnyEvaluation | None) -> tuple[str, ...]:
    """Names of `cells`."""
    if found is None or isinstance(found, Evaluation):
        return ("ppl", "KL", "top-1")
    return ("recall", "lost")


def units(found: AnyEvaluation | None) -> str:
    """What the headings leave open."""
    if found is None or isinstance(found, Evaluation):
        return "KL in nats"
    return "lost: points of recall"


def cells(found: AnyEvaluation, protocol: str) -> list[str]:
    """The scores under a protocol; without a KV scheme they are the same under all."""
    name = protocol if protocol in found.packed else "weights"
    if not isinstance(found, Evaluation):
        lost = "" if found.source is None else f"{100 * (found.source - found.packed[name]):.1f}"
        return [f"{found.packed[name]:.1%}", lost]
    scores = found.packed[name]
    kl = "" if scores.kl is None else f"{scores.kl:.5f}"
    return [f"{scores.perplexity:.3f}", kl, "" if scores.top1 is None else f"{scores.top1:.1%}"]


def source_cells(found: AnyEvaluation) -> list[str]:
    """The source's own scores."""
    if not isinstance(found, Evaluation):
        return ["" if found.source is None else f"{found.source:.1%}", "0.0"]
    return ["" if found.source is None else f"{found.source.perplexity:.3f}", "0", "100.0%"]
