"""What is measured side by side: a column each, and whether they fit into this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpack.artifact.reader import read_manifest
from kvpack.bench.settings import Settings
from kvpack.core.access import Access
from kvpack.core.errors import ResourceError, UsageError
from kvpack.core.resident import available_bytes
from kvpack.core.types import ITEM_BYTES
from kvpack.models.source import read_checkpoint, read_json, resolve

SOURCE, ARTIFACT, QUANTIZED = "source", "artifact", "quantized-cache"
AGAINST = {QUANTIZED: "quantized-fp8"}
"""What else may stand beside: the source's weights with transformers' QuantizedCache and its fp8 backend."""
PROCESS_BYTES = 500_000_000
"""About what Python, torch and transformers take in every process."""


@dataclass(frozen=True)
class Column:
    """One model with one kind of cache.

    `kind` is that of `kvpack.bench.measuring.Measuring`. `weight_bytes` is what its weights take in
    memory, `token_bytes` what one token takes in an uncompressed cache, at least about.
    """

    name: str
    kind: str
    path: Path
    weight_bytes: int
    token_bytes: int
    positions: int
    trust_remote_code: bool = False


def columns_of(
    artifact: Path, source: str | Path | None, against: str | None, access: Access
) -> tuple[Column, ...]:
    """The columns, the source first.

    Raises:
        SourceError: the source leads to no model.
        ArtifactError: the artifact is none.
        UsageError: `against` is unknown, or needs a source.
    """
    if against is not None and against not in AGAINST:
        raise UsageError(f"--against cannot be {against!r}", hint=f"use {' or '.join(AGAINST)}")
    if against is not None and source is None:
        raise UsageError(f"--against {against} needs --source", why="it runs with the source's weights")
    manifest = read_manifest(artifact)
    packed = sum(record.logical.nbytes for record in manifest.weight_tensors().values())
    found = [_column(ARTIFACT, ARTIFACT, artifact, packed, access)]
    if source is not None:
        folder, _ = resolve(source, allow_download=access.allow_download)
        nbytes = sum(tensor.nbytes for tensor in read_checkpoint(folder).values())
        found.insert(0, _column(SOURCE, SOURCE, folder, nbytes, access))
        if against is not None:
            found.append(_column(against, AGAINST[against], folder, nbytes, access))
    return tuple(found)


def _column(name: str, kind: str, path: Path, nbytes: int, access: Access) -> Column:
    whole = read_json(path / "config.json")
    config = whole.get("text_config", whole)
    positions = int(config.get("max_position_embeddings", 0) or 0)
    return Column(name, kind, path, nbytes, _token_bytes(config), positions, access.trust_remote_code)


def _token_bytes(config: dict[str, Any]) -> int:
    heads = int(config.get("num_attention_heads") or 0)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    dim = int(config.get("head_dim") or 0) or int(config.get("hidden_size") or 0) // max(heads, 1)
    item = ITEM_BYTES.get(str(config.get("dtype")), 2)
    return 2 * int(config.get("num_hidden_layers") or 0) * kv_heads * dim * item


def fitted(columns: Sequence[Column], settings: Settings) -> Settings:
    """Settings with defaults that suit the models, if all that was asked for does.

    Raises:
        UsageError: a model has too few positions; with the longest context that would do.
    """
    known = [column.positions for column in columns if column.positions]
    settings = settings.fitted(min(known, default=0))
    if known:
        _check_positions(min(known), settings)
    return settings


def _check_positions(most: int, settings: Settings) -> None:
    longest, steps = max(settings.contexts), settings.all_steps
    if longest + steps > most:
        raise UsageError(
            f"a context of {longest:,} tokens and {steps} steps need {longest + steps:,} positions, "
            f"the model has {most:,}",
            hint=f"use --context {max(most - steps, 1)} or less",
        )
    if settings.prompt_tokens + settings.new_tokens > most:
        raise UsageError(
            f"a prompt of {settings.prompt_tokens:,} and {settings.new_tokens:,} new tokens need more "
            f"positions than the model's {most:,}",
            hint="use a smaller --prompt-tokens or --new-tokens",
        )


def needed_bytes(columns: Sequence[Column], settings: Settings) -> int:
    """Memory that all columns together take at most, about: weights, processes, the longest caches.

    A packed column's cache counts in full: while it is filled, a layer of it is there uncompressed.
    """
    item = ITEM_BYTES.get(settings.dtype)
    longest = max((*settings.contexts, settings.prompt_tokens))
    total = 0
    for column in columns:
        widened = 1 if item is None or column.kind == ARTIFACT else item / 2
        total += int(column.weight_bytes * widened) + column.token_bytes * longest + PROCESS_BYTES
    return total


def check_memory(columns: Sequence[Column], settings: Settings) -> None:
    """Refuse what would not fit: all models are held at once, as they are measured in turns.

    Raises:
        ResourceError: with both numbers.
    """
    free, needed = available_bytes(), needed_bytes(columns, settings)
    if free is not None and needed > free:
        names = ", ".join(column.name for column in columns)
        raise ResourceError(
            f"{names} need about {needed:,} bytes of memory together, {free:,} are free",
            why="they are measured in turns, all of them loaded",
            hint="use a smaller model, fewer --layers of --synthetic, a shorter --context, or no --against",
        )
