"""Accuracy of an artifact, and of its source, in the recall task.

The protocols are those of text: ``prefill`` is one forward in which all tokens read encoded keys
and values; ``decode`` gives the prompt (facts and fillers) in one exact forward and then the
questions in steps, which read what the cache made of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.calibrate.recall_text import RecallSettings, answer_positions, make_sequences, words_of
from kvpack.core.access import CLOSED, Access
from kvpack.core.errors import UsageError
from kvpack.core.progress import SILENT, Progress, counter
from kvpack.evaluate.artifact import load_reference
from kvpack.evaluate.protocols import PROTOCOLS, Held, NewCache, Protocol, longest_step
from kvpack.evaluate.scores import RecallEvaluation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RecallGround:
    """What several artifacts of one model are asked, and the source's share of right answers."""

    settings: RecallSettings
    sequences: Tensor
    source: float | None


def evaluate_recall(
    path: Path,
    source: str | Path | None,
    settings: RecallSettings,
    *,
    protocols: Sequence[Protocol] = PROTOCOLS,
    step_tokens: int | None = None,
    batch: int = 8,
    access: Access = CLOSED,
    progress: Progress = SILENT,
) -> RecallEvaluation:
    """Give the task to the artifact at `path`, and to its source, in one run.

    Args:
        path: the artifact's folder.
        source: the uncompressed model, folder or hub id; None to ask the artifact alone.
        settings: size of the task.
        protocols: which measurements to make.
        step_tokens: question tokens per step; None takes the most that changes nothing.
        batch: sequences at once.
        access: whether the source may come from the network, and models bring code.
        progress: told after each step.

    Raises:
        ArtifactError: the artifact is damaged.
        UsageError: the tokenizer does not know the task, or the model is too short for it.
    """
    from kvpack.loading.load import load

    model = load(path, trust_remote_code=access.trust_remote_code)
    sequences = _sequences(path, model, settings, access)
    reference = None if source is None else load_reference(source, model, access)
    share = None if reference is None else _share(reference, sequences, settings, batch)
    ground = RecallGround(settings, sequences, share)
    return _score(path, model, ground, protocols, step_tokens, batch, progress)


def prepare_recall(
    source: str | Path, settings: RecallSettings, *, batch: int = 8, access: Access = CLOSED
) -> RecallGround:
    """Make the sequences and ask the source, once for many artifacts.

    Raises:
        SourceError: the folder or hub id leads to no model.
        UsageError: the tokenizer does not know the task, or the model is too short for it.
    """
    from kvpack.loading.load import load_source
    from kvpack.models.source import resolve

    folder, _ = resolve(source, allow_download=access.allow_download)
    reference = load_source(folder, access)
    sequences = _sequences(folder, reference, settings, access)
    return RecallGround(settings, sequences, _share(reference, sequences, settings, batch))


def score_recall(
    path: Path,
    ground: RecallGround,
    *,
    protocols: Sequence[Protocol] = PROTOCOLS,
    step_tokens: int | None = None,
    batch: int = 8,
    access: Access = CLOSED,
    progress: Progress = SILENT,
) -> RecallEvaluation:
    """Give the task to an artifact of the source that `ground` was prepared from.

    Raises:
        ArtifactError: the artifact is damaged.
    """
    from kvpack.loading.load import load

    model = load(path, trust_remote_code=access.trust_remote_code)
    return _score(path, model, ground, protocols, step_tokens, batch, progress)


def _sequences(path: Path, model: Any, settings: RecallSettings, access: Access) -> Tensor:
    from kvpack.loading.load import load_tokenizer

    tokenizer = load_tokenizer(path, trust_remote_code=access.trust_remote_code)
    sequences = make_sequences(settings, words_of(tokenizer, str(path)))
    _check_length(model, settings.tokens)
    return sequences


def _score(
    path: Path,
    model: Any,
    ground: RecallGround,
    protocols: Sequence[Protocol],
    step_tokens: int | None,
    batch: int,
    progress: Progress,
) -> RecallEvaluation:
    from kvpack.artifact.reader import read_manifest
    from kvpack.runtime.install import new_cache

    manifest, settings = read_manifest(path), ground.settings
    shares, kv_bits = recall(
        model,
        ground.sequences,
        settings,
        new_cache=(lambda exact: new_cache(model, exact_prefill=exact)) if manifest.kv else None,
        protocols=protocols,
        step_tokens=step_tokens or longest_step(manifest.kv),
        batch=batch,
        progress=progress,
    )
    return RecallEvaluation(
        tokens=settings.tokens,
        facts=settings.facts,
        questions=settings.asked,
        sequences=settings.sequences,
        seed=settings.seed,
        packed=shares,
        source=ground.source,
        bits_per_weight=manifest.totals.bits_per_weight,
        kv_bits=kv_bits,
    )


def recall(
    model: Any,
    sequences: Tensor,
    settings: RecallSettings,
    *,
    new_cache: NewCache | None,
    protocols: Sequence[Protocol] = PROTOCOLS,
    step_tokens: int = 1,
    batch: int = 8,
    progress: Progress = SILENT,
) -> tuple[dict[str, float], dict[str, float]]:
    """Share of right answers on `sequences` [N, T], and bits per element of the caches, by protocol.

    Arguments as of `kvpack.evaluate.protocols.measure`; without `new_cache` the only protocol is
    ``weights``, and there are no caches.
    """
    import torch

    names: Sequence[str] = protocols if new_cache is not None else ("weights",)
    right, held = dict.fromkeys(names, 0), dict.fromkeys(names, Held())
    tick = counter(progress, "recall", sequences.numel() * len(names))
    with torch.inference_mode():
        for ids in torch.split(sequences, batch):
            for name in names:
                cache = None if new_cache is None else new_cache(name == "decode")
                logits = _logits(model, ids, name, cache, settings, step_tokens, tick)
                right[name] += _right(logits, ids, settings)
                if cache is not None:
                    held[name] = held[name].plus(cache, ids.numel())
    asked = len(sequences) * settings.asked
    bits = {name: 8 * found.nbytes / found.elements for name, found in held.items() if found.elements}
    return {name: count / asked for name, count in right.items()}, bits


def _share(model: Any, sequences: Tensor, settings: RecallSettings, batch: int) -> float:
    """Share of right answers of an uncompressed model."""
    import torch

    with torch.inference_mode():
        parts = torch.split(sequences, batch)
        right = sum(_right(model(ids, use_cache=False).logits, ids, settings) for ids in parts)
    return right / (len(sequences) * settings.asked)


def _logits(
    model: Any,
    ids: Tensor,
    protocol: str,
    cache: Any,
    settings: RecallSettings,
    step_tokens: int,
    tick: Callable[[int], None],
) -> Tensor:
    """Logits of the question part [B, T', V]."""
    import torch

    from kvpack.runtime.sparsity import every_token_sparse

    parts = list(_steps(ids, settings.prompt_tokens, step_tokens)) if protocol == "decode" else [ids]
    logits = []
    with every_token_sparse(model):
        for part in parts:
            logits.append(model(part, past_key_values=cache, use_cache=cache is not None).logits)
            tick(part.numel())
    questions = ids.shape[1] - settings.prompt_tokens
    return torch.cat(logits[1:] if len(parts) > 1 else logits, dim=1)[:, -questions:]


def _steps(ids: Tensor, prompt_tokens: int, step: int) -> Iterator[Tensor]:
    """The prompt, then steps that end at multiples of `step`, where token blocks end."""
    yield ids[:, :prompt_tokens]
    start = prompt_tokens
    while start < ids.shape[1]:
        stop = min(start + step - start % step, ids.shape[1])
        yield ids[:, start:stop]
        start = stop


def _right(logits: Tensor, ids: Tensor, settings: RecallSettings) -> int:
    """How many answers of `ids` [B, T] the logits of its last tokens [B, T', V] name."""
    answers = answer_positions(settings)
    offset = ids.shape[1] - logits.shape[1]
    said = logits[:, [at - 1 - offset for at in answers]].argmax(-1)
    return int((said == ids[:, answers]).sum())


def _check_length(model: Any, tokens: int) -> None:
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise UsageError(
            f"{tokens:,} tokens are more than the model reads ({longest:,})",
            hint=f"use --recall-tokens {longest}",
        )
