"""Where a model lives: a local folder or a hub snapshot, and the shards inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvpack.core.errors import SourceError, UnsupportedModel
from kvpack.core.model_spec import SourceTensor
from kvpack.core.safetensors_header import read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What a snapshot needs: weights as safetensors, configuration, tokenizer. Pickles never.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*"]


def resolve(reference: str | Path, *, allow_download: bool = False) -> tuple[Path, str | None]:
    """Find the folder of a model.

    Args:
        reference: a local folder, or a hub id with an optional ``@revision``.
        allow_download: fetch from the hub what is not in the local hub cache.

    Returns:
        The folder and the commit hash of a hub snapshot (None for a local folder).

    Raises:
        SourceError: there is no such folder, and no such snapshot within reach.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.exists() or not _is_hub_id(str(reference)):
        raise SourceError(
            "is not a model folder", where=str(reference), hint="give a folder with config.json, or a hub id"
        )
    return _snapshot(str(reference), allow_download)


def _is_hub_id(reference: str) -> bool:
    """`name` or `owner/name`, optionally with a revision; nothing that looks like a path."""
    identifier = reference.partition("@")[0]
    return 0 <= identifier.count("/") <= 1 and identifier[:1].isalnum() and "\\" not in identifier


def _snapshot(reference: str, allow_download: bool) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    identifier, _, revision = reference.partition("@")
    try:
        path = snapshot_download(
            identifier,
            revision=revision or None,
            local_files_only=not allow_download,
            allow_patterns=_WANTED,
        )
    except LocalEntryNotFoundError as error:
        where = "" if allow_download else ", nor in the local hub cache"
        hint = "check the network" if allow_download else "pass --allow-download to fetch it from the hub"
        raise SourceError(
            f"no such folder{where}" if where else "the hub cannot be reached", where=reference, hint=hint
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(
            "cannot be fetched from the hub",
            where=reference,
            why=reason,
            hint="check the id, revision and token",
        ) from error
    return Path(path), Path(path).name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of the model folder.

    Raises:
        SourceError: missing, unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path.name} is missing", where=str(path.parent)) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError("is not readable JSON", where=str(path), why=str(error)) from error
    if not isinstance(content, dict):
        raise SourceError("is not a JSON object", where=str(path))
    return content


def read_checkpoint(folder: Path) -> dict[str, SourceTensor]:
    """List every tensor of a checkpoint from its headers, without reading any weight.

    Raises:
        SourceError: no safetensors weights, a shard that is missing, truncated or disagrees with
            the index, or a tensor that two shards hold.
    """
    if (folder / INDEX).exists():
        return _read_sharded(folder)
    if (folder / SINGLE).exists():
        return _read_shard(folder, SINGLE)
    pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise UnsupportedModel(
            f"holds only pickled weights ({pickles[0]})",
            where=str(folder),
            why="loading a pickle runs code from the file",
            hint="convert it first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    raise SourceError(f"holds neither {SINGLE} nor {INDEX}", where=str(folder))


def _read_sharded(folder: Path) -> dict[str, SourceTensor]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise SourceError("has no weight_map from tensors to files", where=str(folder / INDEX))
    tensors: dict[str, SourceTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise SourceError(
                f"names {file!r}, which is not a file of this folder", where=str(folder / INDEX)
            )
        if not (folder / file).is_file():
            raise SourceError(
                f"{file} is missing", where=str(folder), why="the index names it", hint="download it again"
            )
        tensors.update(_read_shard(folder, file))
    _check_index(folder, weight_map, tensors)
    return tensors


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, SourceTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise SourceError(
                f"tensor {name!r} is not in {file}",
                where=str(folder / INDEX),
                hint="download the model again",
            )
    unlisted = sorted(tensors.keys() - weight_map.keys())
    if unlisted:
        file = tensors[unlisted[0]].file
        raise SourceError(f"does not list {unlisted[0]!r} of {file}", where=str(folder / INDEX))


def _read_shard(folder: Path, file: str) -> dict[str, SourceTensor]:
    header = read_header(folder / file, error=SourceError)
    return {name: SourceTensor(tuple(e.shape), e.dtype, file) for name, e in header.tensors.items()}
