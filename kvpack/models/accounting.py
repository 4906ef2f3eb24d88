"""Strict accounting: every checkpoint tensor has a place, every parameter has a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from kvpack.core.errors import SourceError, UnsupportedModel
from kvpack.core.model_spec import SourceTensor
from kvpack.models.expert_tensors import ExpertTensors
from kvpack.models.weights import SourceReader

# transformers moved these buffers out of the checkpoint; old checkpoints still carry them.
_MOVED = r"rotary_emb\.inv_freq$"


def rename(model: PreTrainedModel, stored: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Give checkpoint tensors the names of the skeleton.

    transformers renames some tensors on load (GPT-NeoX: embed_out -> lm_head) and fuses experts,
    which the skeleton has apart. Renamings are followed, and experts are found in either layout; a
    checkpoint whose tensors must be merged or split otherwise is left for `account` to refuse.

    Raises:
        SourceError: two tensors get the same name.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [t for t in conversions if type(t) is WeightRenaming]
    experts = ExpertTensors(model, conversions)
    known = model.state_dict().keys()
    tensors: dict[str, SourceTensor] = {}
    for old, tensor in stored.items():
        new = old
        for renaming in renamings if old not in known else ():
            new, _ = renaming.rename_source_key(new)
        stated = tensor if new == old else replace(tensor, stored_name=old)
        found = {new: stated} if new in known else experts.of(new, replace(tensor, stored_name=old))
        for name, piece in (found or {old: tensor}).items():
            if name in tensors or (name != old and name in stored):
                raise SourceError(f"{old} and another tensor are both {name}", where=tensor.file)
            tensors[name] = piece
    return tensors


def account(
    path: Path, model: PreTrainedModel, tensors: Mapping[str, SourceTensor]
) -> tuple[dict[str, str], dict[str, str]]:
    """Match a checkpoint with the architecture.

    Returns:
        Tied tensors (name -> name of the one that holds the data) and ignored ones (-> reason).

    Raises:
        SourceError: missing tensors, or wrong shapes.
        UnsupportedModel: tensors that the architecture does not know.
    """
    wanted = model.state_dict()
    ignored = _ignored(model, tensors.keys() - wanted.keys())
    unknown = tensors.keys() - wanted.keys() - ignored.keys()
    tied = _tied(path, model, tensors)
    missing = wanted.keys() - tensors.keys() - tied.keys()
    if unknown:
        converted = missing and "transformers may rename or merge them on load; "
        raise UnsupportedModel(
            f"{_some(unknown)} not part of {type(model).__name__}",
            where=str(path),
            why=f"{converted or ''}copying or dropping them silently would be wrong",
        )
    if missing:
        raise SourceError(f"{_some(missing)} missing", where=str(path), hint="download the model again")
    for name in sorted(wanted.keys() & tensors.keys()):
        if tuple(wanted[name].shape) != tensors[name].shape:
            raise SourceError(
                f"{name} is {list(tensors[name].shape)}, config.json asks for {list(wanted[name].shape)}",
                where=str(path / tensors[name].file),
            )
    return tied, ignored


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}: {'is' if len(names) == 1 else 'are'}"


def _ignored(model: PreTrainedModel, extra: Iterable[str]) -> dict[str, str]:
    patterns = [_MOVED, *sorted(model._keys_to_ignore_on_load_unexpected or ())]
    return {
        name: "a computed buffer that transformers ignores"
        for name in sorted(extra)
        if any(re.search(pattern, name) for pattern in patterns)
    }


def _tied(path: Path, model: PreTrainedModel, tensors: Mapping[str, SourceTensor]) -> dict[str, str]:
    """Tied names -> the tensor that holds the data, whichever of the two the checkpoint has."""
    tied = {}
    for target, source in sorted(model.all_tied_weights_keys.items()):
        if target in tensors and source in tensors and not _equal(path, tensors, target, source):
            raise SourceError(
                f"{target} and {source} differ",
                where=str(path),
                why="config.json says that they are tied",
                hint="set tie_word_embeddings to false in config.json",
            )
        if source in tensors:
            tied[target] = source
        elif target in tensors:
            tied[source] = target
    return tied


def _equal(path: Path, tensors: Mapping[str, SourceTensor], a: str, b: str) -> bool:
    reader = SourceReader(path, tensors)
    same_kind = (tensors[a].shape, tensors[a].dtype) == (tensors[b].shape, tensors[b].dtype)
    return same_kind and torch.equal(reader.read(a), reader.read(b))
