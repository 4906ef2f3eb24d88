"""How it is measured: chunks of text, and the ways a quantised cache takes part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kvpack.core.errors import UsageError
from kvpack.core.progress import SILENT, Progress, counter
from kvpack.evaluate.retrieval import RetrievalScores, RetrievalTally
from kvpack.evaluate.scores import Scores, Tally
from kvpack.evaluate.stored_errors import LayerError, StoredErrors
from kvpack.recipe.kv_plan import PLANES, KVLayerPlan

if TYPE_CHECKING:
    from torch import Tensor

Protocol = Literal["prefill", "decode"]
PROTOCOLS: tuple[Protocol, ...] = ("prefill", "decode")

NewCache = Callable[[bool], Any]
"""Makes a fresh compressed cache; the argument tells whether a chunk attends to its own exact keys."""


@dataclass(frozen=True)
class Held:
    """What caches held after each chunk, summed over chunks: bytes, numbers, tokens."""

    nbytes: int = 0
    elements: int = 0
    tokens: int = 0

    def plus(self, cache: Any, tokens: int) -> Held:
        """With one more cache counted."""
        return Held(self.nbytes + cache.nbytes, self.elements + cache.elements, self.tokens + tokens)


@dataclass(frozen=True)
class Measured:
    """Scores by protocol, the source's, and what the caches held, summed over all chunks.

    `kv_bytes`, `kv_elements` and `kv_tokens` are of the caches as they stood after each chunk of
    the last protocol, `held` those of every protocol; 0 and empty without a KV scheme.
    `layer_errors` are those of ``prefill``, where the newest tokens are stored, too. `retrieval` is
    measured in the last protocol, None where no tokens are retrieved.
    """

    packed: dict[str, Scores]
    source: Scores | None
    kv_bytes: int = 0
    kv_elements: int = 0
    kv_tokens: int = 0
    held: Mapping[str, Held] = field(default_factory=dict)
    layer_errors: tuple[LayerError, ...] = ()
    retrieval: RetrievalScores | None = None


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
        pieces = torch.split(ids, context_tokens) if len(documents) == 1 else [ids[:context_tokens]]
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


def measure(
    packed: Any,
    source: Any | None,
    pieces: Sequence[Tensor],
    *,
    new_cache: NewCache | None,
    protocols: Sequence[Protocol] = PROTOCOLS,
    step_tokens: int = 1,
    batch: int = 8,
    progress: Progress = SILENT,
) -> Measured:
    """Score a packed model, and its source beside it, on `pieces`.

    Args:
        packed: the loaded artifact.
        source: the uncompressed model; None to score the packed one alone.
        pieces: token ids, from `chunks`.
        new_cache: None for an artifact without a KV scheme.
        protocols: which measurements to make.
        step_tokens: tokens fed per step in ``decode``; 1 is what generation does. More is faster and
            equal where tokens are encoded at the same positions: in windows of whole blocks that
            the step divides. Elsewhere a token sees up to a step more of its past exactly.
        batch: chunks scored together.
        progress: told after each step, in tokens over all measurements.
    """
    import torch

    names: Sequence[str] = protocols if new_cache is not None else ("weights",)
    found = _Found(names)
    tick = counter(progress, "evaluate", sum(len(p) for p in pieces) * len(names))
    with torch.inference_mode():
        for ids in batches(pieces, batch):
            exact = None if source is None else source(ids, use_cache=False).logits[:, :-1]
            if exact is not None:
                found.reference.add(exact, ids[:, 1:])
            for name in names:
                cache = None if new_cache is None else new_cache(name == "decode")
                found.watch(name, cache)
                logits = _run(packed, ids, cache, step_tokens if name == "decode" else None, tick)
                found.add(name, logits, ids, exact, cache)
    return found.measured(compared=source is not None)


class _Found:
    """What `measure` sums up over batches, by protocol."""

    def __init__(self, names: Sequence[str]) -> None:
        self.last = names[-1]
        self.reference, self.tallies = Tally(), {name: Tally() for name in names}
        self.held: dict[str, Held] = {}
        self.errors, self.retrieved = StoredErrors(), RetrievalTally()

    def watch(self, name: str, cache: Any) -> None:
        """Follow what happens in a cache, before it is used."""
        if name == "prefill":
            self.errors.watch(cache)
        if name == self.last:
            self.retrieved.watch(cache)

    def add(self, name: str, logits: Tensor, ids: Tensor, exact: Tensor | None, cache: Any) -> None:
        """Count logits [B, T, V] of tokens `ids` [B, T], and what their cache holds."""
        self.tallies[name].add(logits[:, :-1], ids[:, 1:], exact)
        if cache is not None:
            self.held[name] = self.held.get(name, Held()).plus(cache, ids.numel())

    def measured(self, *, compared: bool) -> Measured:
        """Everything together; with the source's scores where it was `compared`."""
        last = self.held.get(self.last, Held())
        return Measured(
            {name: tally.scores() for name, tally in self.tallies.items()},
            self.reference.scores() if compared else None,
            last.nbytes,
            last.elements,
            last.tokens,
            self.held,
            self.errors.layers(),
            self.retrieved.scores(),
        )


def _run(model: Any, ids: Tensor, cache: Any, step_tokens: int | None, tick: Callable[[int], None]) -> Tensor:
    """Logits [B, T, V] of `model`, all tokens at once or `step_tokens` at a time through `cache`."""
    import torch

    from kvpack.runtime.sparsity import every_token_sparse

    logits = []
    with every_token_sparse(model):  # as each of them would be were it generated
        for step in (ids,) if step_tokens is None else torch.split(ids, step_tokens, 1):
            logits.append(model(step, past_key_values=cache, use_cache=cache is not None).logits)
            tick(step.numel())
    return torch.cat(logits, dim=1)


def longest_step(layers: Iterable[KVLayerPlan], at_most: int = 32) -> int:
    """Tokens that ``decode`` may feed per step and still score what token by token would.

    A window of whole blocks must be a multiple of the step; a window without blocks must reach at
    least as far back. Schemes without a window, and policies that search pieces of a prompt for
    sinks, go token by token.
    """
    planes = [(layer.policy, layer.block(p), p) for layer in layers for p in PLANES]

    def safe(step: int) -> bool:
        for policy, block, plane in planes:
            if policy.scorer is not None and not policy.scorer.cut_free:
                return False
            if policy.needs_hidden or (block == 1 and policy.leaving(step, 1, plane)):
                return False
            if block > 1:
                full = next((n for n in range(step, 65 * at_most) if policy.leaving(n, block, plane)), step)
                if full % step or policy.leaving(step - 1, block, plane):
                    return False
        return True

    return next(
        step for step in (at_most >> i for i in range(at_most.bit_length())) if step == 1 or safe(step)
    )
