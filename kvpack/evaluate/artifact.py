"""Evaluating an artifact: load it and its source, score both on one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.core.access import CLOSED, Access
from kvpack.core.errors import UsageError
from kvpack.core.progress import SILENT, Progress
from kvpack.evaluate.protocols import PROTOCOLS, Protocol, chunks, longest_step, measure
from kvpack.evaluate.scores import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from kvpack.artifact.manifest import Manifest


@dataclass(frozen=True)
class EvaluationSettings:
    """What to score on, and how much of it.

    Rows of a .jsonl file are scored apart, each up to `context_tokens`; all other texts are joined
    by blank lines and cut into chunks. `step_tokens` None takes the longest step that changes
    nothing, see `longest_step`. With `weights_only`, one plain forward without a compressed cache.
    """

    data: str = "builtin:stdlib"
    context_tokens: int = 512
    max_tokens: int = 4096
    step_tokens: int | None = None
    batch: int = 8
    protocols: Sequence[Protocol] = PROTOCOLS
    weights_only: bool = False


def evaluate(
    path: Path,
    source: str | Path | None,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    access: Access = CLOSED,
    progress: Progress = SILENT,
) -> Evaluation:
    """Score the artifact at `path`, and its source beside it, in one run.

    Args:
        path: the artifact's folder.
        source: the uncompressed model, folder or hub id; None to score the artifact alone.
        settings: text and amounts.
        access: whether source and text may come from the network, and models bring code.
        progress: told after each batch.

    Raises:
        ArtifactError: the artifact is damaged.
        UsageError: the text cannot be had or is too short, or the source has another vocabulary.
    """
    from kvpack.loading.load import load

    model = load(path, trust_remote_code=access.trust_remote_code)
    reference = None if source is None else load_reference(source, model, access)
    name, pieces = _pieces(path, model, settings, access)
    return _score(path, model, Ground(reference, name, pieces, settings), progress)


@dataclass(frozen=True)
class Ground:
    """What several artifacts of one model are scored against: the source, loaded, and the text as tokens."""

    reference: Any
    text: str
    pieces: Sequence[Tensor]
    settings: EvaluationSettings


def prepare(source: str | Path, settings: EvaluationSettings, *, access: Access = CLOSED) -> Ground:
    """Load a source and cut the text into its tokens, once for many artifacts.

    Raises:
        SourceError: the folder or hub id leads to no model.
        UsageError: the text cannot be had or is too short.
    """
    from kvpack.loading.load import load_source
    from kvpack.models.source import resolve

    folder, _ = resolve(source, allow_download=access.allow_download)
    reference = load_source(folder, access)
    return Ground(reference, *_pieces(folder, reference, settings, access), settings)


def score(path: Path, ground: Ground, *, access: Access = CLOSED, progress: Progress = SILENT) -> Evaluation:
    """Score an artifact of the source that `ground` was prepared from.

    Raises:
        ArtifactError: the artifact is damaged.
    """
    from kvpack.loading.load import load

    return _score(path, load(path, trust_remote_code=access.trust_remote_code), ground, progress)


def _score(path: Path, model: Any, ground: Ground, progress: Progress) -> Evaluation:
    from kvpack.artifact.reader import read_manifest
    from kvpack.runtime.install import new_cache
    from kvpack.runtime.sparsity import sparsity_of

    manifest, settings, pieces = read_manifest(path), ground.settings, ground.pieces
    step = settings.step_tokens or longest_step(manifest.kv)
    cached = bool(manifest.kv) and not settings.weights_only
    measured = measure(
        model,
        ground.reference,
        pieces,
        new_cache=(lambda exact: new_cache(model, exact_prefill=exact)) if cached else None,
        protocols=settings.protocols,
        step_tokens=step,
        batch=settings.batch,
        progress=progress,
    )
    return Evaluation(
        text=ground.text,
        tokens=sum(len(piece) - 1 for piece in pieces),
        context_tokens=max(len(piece) for piece in pieces),
        step_tokens=step,
        packed=measured.packed,
        bits_per_weight=manifest.totals.bits_per_weight,
        source=measured.source,
        packed_bits=_packed_bits(manifest),
        kv_bits_per_element=8 * measured.kv_bytes / measured.kv_elements if cached else None,
        kv_bytes_per_token=measured.kv_bytes / measured.kv_tokens if cached else None,
        kv_bits={name: 8 * held.nbytes / held.elements for name, held in measured.held.items()},
        layer_errors=measured.layer_errors,
        retrieval=measured.retrieval,
        activity={} if manifest.sparsity is None else sparsity_of(model),
    )


def _packed_bits(manifest: Manifest) -> float | None:
    """Stored bits per element of the packed layers."""
    layers = manifest.weights.values()
    elements = sum(x.shape[0] * x.shape[1] for x in layers)
    stored = sum(record.nbytes for x in layers for record in x.tensors.values())
    return 8 * stored / elements if elements else None


def _vocabulary(model: Any) -> int:
    """Tokens that a model's logits are about."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def load_reference(source: str | Path, model: Any, access: Access) -> Any:
    """The source model, if it speaks the artifact's vocabulary.

    Raises:
        UsageError: it does not.
        SourceError: `source` leads to no model.
    """
    from kvpack.loading.load import load_source

    reference = load_source(source, access)
    theirs, ours = _vocabulary(reference), _vocabulary(model)
    if theirs != ours:
        raise UsageError(
            f"knows {theirs:,} tokens, the artifact {ours:,}",
            where=str(source),
            hint="give the model that the artifact was made from",
        )
    return reference


def _pieces(path: Path, model: Any, settings: EvaluationSettings, access: Access) -> tuple[str, list[Tensor]]:
    """The text's name, and its chunks of token ids."""
    from kvpack.calibrate.data import load_text
    from kvpack.loading.load import load_tokenizer

    text = load_text(settings.data, allow_download=access.allow_download)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    context = min(settings.context_tokens, longest or settings.context_tokens)
    tokenizer = load_tokenizer(path, trust_remote_code=access.trust_remote_code)
    documents = text.documents if settings.data.endswith(".jsonl") else ("\n\n".join(text.documents),)
    return text.name, chunks(documents, tokenizer, context, settings.max_tokens)
