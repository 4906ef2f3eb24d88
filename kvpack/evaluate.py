"""Quality of a packed model beside its source: perplexity, KL divergence, top-1 agreement.

Quantised KV caches are measured in the two ways that the literature uses, and never in the third
one that measures nothing (a single forward through a cache that returns exact keys and values):

- ``prefill`` (KVQuant, RotateKV): one forward over the chunk in which every key and value that
  fills a token block is quantised, the newest included; windows do not apply, sinks do.
- ``decode`` (what users experience): teacher forcing through the real cache, `step_tokens` at a
  time; recent tokens are exact, older ones are encoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvpack.core.errors import UsageError
from kvpack.core.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

Protocol = Literal["prefill", "decode"]
PROTOCOLS: tuple[Protocol, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Scores:
    """Means over all scored tokens.

    `kl` is KL(source || model) in nats; `top1` the share of tokens where both have the same most
    likely next token. Both are None for the source itself.
    """

    perplexity: float
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a source and of a packed model on the same text, from one run."""

    text: str
    tokens: int
    context_tokens: int
    step_tokens: int
    source: Scores
    packed: dict[str, Scores]
    kv_bits_per_element: float | None
    kv_bytes: int | None
    weight_bits: float

    def metrics(self, protocol: str) -> dict[str, float]:
        """Numbers that a gate may name, for one protocol."""
        scores = self.packed[protocol]
        values = {
            "ppl": scores.perplexity,
            "ppl_ratio": scores.perplexity / self.source.perplexity,
            "weight_bits": self.weight_bits,
        }
        optional = {"kl": scores.kl, "top1": scores.top1, "kv_bits": self.kv_bits_per_element}
        return values | {name: value for name, value in optional.items() if value is not None}


@dataclass
class _Tally:
    """Sums over tokens; float64, so that the order of chunks does not show."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agree: int = 0
    compared: bool = field(default=False)

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """Count `logits` [B, T, V] for `targets` [B, T], against the source's `reference`."""
        log_p = logits.float().log_softmax(-1)
        self.tokens += targets.numel()
        self.nll -= float(log_p.gather(-1, targets.unsqueeze(-1)).double().sum())
        if reference is not None:
            log_q = reference.float().log_softmax(-1)
            self.kl += float((log_q.exp() * (log_q - log_p)).sum(-1).double().sum())
            self.agree += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
            self.compared = True

    def scores(self) -> Scores:
        perplexity = math.exp(min(self.nll / self.tokens, 700.0))
        if not self.compared:
            return Scores(perplexity)
        return Scores(perplexity, self.kl / self.tokens, self.agree / self.tokens)


def chunks(documents: Sequence[str], tokenizer: Any, context_tokens: int, limit_tokens: int) -> list[Tensor]:
    """Token ids to score, each [T] with T <= `context_tokens`.

    One document is cut into non-overlapping chunks (the GPTQ convention); several documents stay
    apart, each cut off at `context_tokens`.

    Raises:
        UsageError: no document has two tokens.
    """
    import torch

    result: list[Tensor] = []
    total = 0
    for document in documents:
        ids = torch.tensor(tokenizer(document, verbose=False)["input_ids"], dtype=torch.long)
        pieces = ids.split(context_tokens) if len(documents) == 1 else [ids[:context_tokens]]
        for piece in pieces:
            if total >= limit_tokens:
                return result
            if len(documents) == 1 and result and len(piece) < context_tokens:
                continue
            if len(piece) >= 2:
                result.append(piece)
                total += len(piece)
    if not result:
        raise UsageError("the evaluation text holds fewer than two tokens", hint="pass a longer --data file")
    return result


def batches(pieces: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Stack neighbouring chunks of equal length into [B, T], at most `size` each."""
    import torch

    start = 0
    while start < len(pieces):
        stop = start + 1
        while stop < len(pieces) and stop - start < size and len(pieces[stop]) == len(pieces[start]):
            stop += 1
        yield torch.stack(list(pieces[start:stop]))
        start = stop


def evaluate(
    packed: Any,
    source: Any,
    pieces: Sequence[Tensor],
    *,
    new_cache: Callable[[bool], Any] | None,
    protocols: Sequence[Protocol] = PROTOCOLS,
    step_tokens: int = 32,
    batch: int = 4,
    progress: Progress = SILENT,
) -> tuple[Scores, dict[str, Scores], Any]:
    """Score both models on `pieces`.

    Args:
        packed: the loaded artifact.
        source: the uncompressed model.
        pieces: token ids, from `chunks`.
        new_cache: makes a fresh compressed cache; its argument tells whether a prompt chunk
            attends to its own exact keys. None for an artifact without a KV scheme.
        protocols: which measurements to make.
        step_tokens: tokens fed per step in ``decode``; 1 is exact, more is faster and equal
            where the recent window is at least as long.
        batch: chunks scored together.
        progress: told after each batch.

    Returns:
        The source's scores, the packed model's per protocol, and the last decode cache.
    """
    import torch

    names: Sequence[str] = protocols if new_cache is not None else ("weights",)
    reference, tallies = _Tally(), {name: _Tally() for name in names}
    done, total, cache = 0, sum(len(p) for p in pieces), None
    with torch.inference_mode():
        for ids in batches(pieces, batch):
            exact = source(ids, use_cache=False).logits[:, :-1]
            reference.add(exact, ids[:, 1:], None)
            for name, tally in tallies.items():
                logits, used = _run(packed, ids, name, new_cache, step_tokens)
                cache = used if name == "decode" else cache
                tally.add(logits[:, :-1], ids[:, 1:], exact)
            done += ids.numel()
            progress("evaluate", done, total, f"perplexity {reference.scores().perplexity:.2f} (source)")
    return reference.scores(), {n: t.scores() for n, t in tallies.items()}, cache


def _run(
    model: Any, ids: Tensor, protocol: str, new_cache: Callable[[bool], Any] | None, step_tokens: int
) -> tuple[Tensor, Any]:
    """Logits [B, T, V] of `model` under one protocol, and the cache it used."""
    import torch

    if new_cache is None:
        return model(ids, use_cache=False).logits, None
    cache = new_cache(protocol == "decode")
    steps = ids.split(step_tokens, dim=1) if protocol == "decode" else (ids,)
    logits = [model(step, past_key_values=cache, use_cache=True).logits for step in steps]
    return torch.cat(logits, dim=1), cache


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


def parse_gates(text: str) -> list[Gate]:
    """Read ``"ppl_ratio<=1.02,kl<=0.01"``.

    Raises:
        UsageError: an unknown metric, or no ``<=``/``>=`` with a number.
    """
    gates = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        operator: Literal["<=", ">="] = "<=" if "<=" in item else ">="
        metric, found, bound = (part.strip() for part in item.partition(operator))
        if not found or metric not in METRICS:
            raise UsageError(
                f"cannot read the gate {item!r}",
                hint=f"write METRIC<=NUMBER or METRIC>=NUMBER, with METRIC one of {', '.join(METRICS)}",
            )
        try:
            gates.append(Gate(metric, operator, float(bound)))
        except ValueError:
            raise UsageError(
                f"{bound!r} in gate {item!r} is not a number", hint="for example kl<=0.01"
            ) from None
    return gates


def failed_gates(evaluation: Evaluation, gates: Sequence[Gate]) -> list[str]:
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


def document_name(spec: str) -> str:
    """How a text is called in reports: a file's name without its folder, or the spec itself."""
    return spec if ":" in spec and not Path(spec).exists() else Path(spec).name
