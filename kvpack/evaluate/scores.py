"""What is measured: means over tokens, and the evaluation they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpack.evaluate.retrieval import RetrievalScores
from kvpack.evaluate.stored_errors import LayerError
from kvpack.recipe.sparsity import Activity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Means over all scored tokens.

    `kl` is KL(source || model) in nats; `top1` the share of tokens where both have the same most
    likely next token. Both are None where there was no source to compare with.
    """

    perplexity: float
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a packed model and of its source on the same text, from one run.

    `tokens` were scored in chunks of at most `context_tokens`. `kv_bits_per_element` and
    `kv_bytes_per_token` are measured on the caches after each chunk, everything stored counted;
    None without a KV scheme. They are of the last protocol measured; `kv_bits` has each protocol's.
    `bits_per_weight` counts all weight tensors, `packed_bits` is per element of the packed layers, None
    where none are. `layer_errors` belong to ``prefill``. `retrieval` is
    there where queries read chosen tokens only. `activity` tells by module what sparse activations kept:
    every token is scored sparse, those of prompts too.
    """

    text: str
    tokens: int
    context_tokens: int
    step_tokens: int
    packed: Mapping[str, Scores]
    bits_per_weight: float
    source: Scores | None = None
    packed_bits: float | None = None
    kv_bits_per_element: float | None = None
    kv_bytes_per_token: float | None = None
    kv_bits: Mapping[str, float] = field(default_factory=dict)
    layer_errors: tuple[LayerError, ...] = ()
    retrieval: RetrievalScores | None = None
    activity: Mapping[str, Activity] = field(default_factory=dict)

    def metrics(self, protocol: str) -> dict[str, float]:
        """The numbers that a gate may name, for one protocol."""
        scores = self.packed[protocol]
        values: dict[str, float | None] = {
            "ppl": scores.perplexity,
            "ppl_ratio": scores.perplexity / self.source.perplexity if self.source else None,
            "kl": scores.kl,
            "top1": scores.top1,
            "weight_bits": self.bits_per_weight,
            "kv_bits": self.kv_bits_per_element,
        }
        return {name: value for name, value in values.items() if value is not None}

    def cost(self, protocol: str) -> float:
        """What is lost, the less the better: KL divergence; perplexity where there was no source."""
        scores = self.packed[protocol]
        return scores.perplexity if scores.kl is None else scores.kl


@dataclass(frozen=True)
class RecallEvaluation:
    """Share of right answers of a packed model, by protocol, and of its source; from one run.

    `sequences` of `tokens` tokens hold `facts` facts and ask `questions` questions each.
    `kv_bits` per element is measured on each protocol's caches after each sequence, everything
    stored counted; empty without a KV scheme.
    """

    tokens: int
    facts: int
    questions: int
    sequences: int
    seed: int
    packed: Mapping[str, float]
    bits_per_weight: float
    source: float | None = None
    kv_bits: Mapping[str, float] = field(default_factory=dict)

    @property
    def kv_bits_per_element(self) -> float | None:
        """The bits of the last protocol; None without a KV scheme."""
        return next(reversed(list(self.kv_bits.values())), None)

    def metrics(self, protocol: str) -> dict[str, float]:
        """The numbers that a gate may name, for one protocol."""
        values: dict[str, float | None] = {
            "recall": self.packed[protocol],
            "recall_loss": None if self.source is None else self.source - self.packed[protocol],
            "weight_bits": self.bits_per_weight,
            "kv_bits": self.kv_bits_per_element,
        }
        return {name: value for name, value in values.items() if value is not None}

    def cost(self, protocol: str) -> float:
        """What is lost, the less the better: the share of wrong answers."""
        return 1 - self.packed[protocol]


class Tally:
    """Sums over tokens; in float64, so that the order of chunks does not show."""

    def __init__(self) -> None:
        self.tokens = self.agreeing = 0
        self.nll = self.kl = 0.0
        self.compared = False

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Count `logits` [B, T, V] that predict `targets` [B, T], beside the source's `reference`."""
        log_p = logits.float().log_softmax(-1)
        self.tokens += targets.numel()
        self.nll -= float(log_p.gather(-1, targets.unsqueeze(-1)).double().sum())
        if reference is not None:
            log_q = reference.float().log_softmax(-1)
            self.kl += float((log_q.exp() * (log_q - log_p)).sum(-1).double().sum())
            self.agreeing += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
            self.compared = True

    def scores(self) -> Scores:
        """The means so far; a hopeless model's perplexity is capped at e^700."""
        perplexity = math.exp(min(self.nll / self.tokens, 700.0))
        if not self.compared:
            return Scores(perplexity)
        return Scores(perplexity, self.kl / self.tokens, self.agreeing / self.tokens)
