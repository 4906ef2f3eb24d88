"""Tensors of experts in a checkpoint, under the names that they have in `kvpack.models.experts`.

A checkpoint holds a tensor per expert and projection, named as the family's authors did (w1, w3 and
w2 in Mixtral), or the fused ones. Names are taken from the conversions by which transformers fuses
what it loads; of a fused tensor each expert's rows are found as a run of elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightTransform

from kvpack.core.errors import SourceError
from kvpack.core.model_spec import SourceTensor
from kvpack.models.experts import Experts

_SIDES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Fused parameter -> projections whose rows follow each other in it."""


class ExpertTensors:
    """Finds the tensors of a model's experts; the model's experts are taken apart already.

    Args:
        model: the skeleton.
        conversions: what transformers does to a checkpoint of this model.
    """

    def __init__(self, model: nn.Module, conversions: Sequence[WeightTransform]) -> None:
        self._experts = {name: m for name, m in model.named_modules() if isinstance(m, Experts)}
        self._merges = [c for c in conversions if isinstance(c, WeightConverter) and _merges(c)]

    def of(self, name: str, tensor: SourceTensor) -> Mapping[str, SourceTensor]:
        """The tensors that a stored one holds, by name; empty when it is not a tensor of experts.

        Raises:
            SourceError: a fused tensor has another shape than the model asks for.
        """
        path, _, leaf = name.rpartition(".")
        if path in self._experts and leaf in _SIDES:
            return dict(_pieces(path, leaf, self._experts[path], tensor))
        renamed = self._renamed(name)
        return {renamed: tensor} if renamed else {}

    def _renamed(self, name: str) -> str:
        """Our name of one expert's projection; empty when no conversion knows the stored one."""
        for merge in self._merges:
            target, pattern = merge.rename_source_key(name)
            path, _, leaf = target.rpartition(".")
            if pattern is None or path not in self._experts or not name.startswith(f"{path}."):
                continue
            number = name.removeprefix(f"{path}.").partition(".")[0]
            return f"{path}.{number}.{_SIDES[leaf][merge.source_patterns.index(pattern)]}.weight"
        return ""


def _merges(conversion: WeightConverter) -> bool:
    """Whether a conversion only stacks experts, and gate on up."""
    targets = [target.rpartition(".")[2] for target in conversion.target_patterns]
    if len(targets) != 1 or len(_SIDES.get(targets[0], ())) != len(conversion.source_patterns):
        return False
    kinds = [(type(step), getattr(step, "dim", None)) for step in conversion.operations]
    return kinds == [(MergeModulelist, 0), (Concatenate, 1)][: len(conversion.source_patterns)]


def _pieces(
    path: str, leaf: str, experts: Experts, tensor: SourceTensor
) -> Iterator[tuple[str, SourceTensor]]:
    sides, first = _SIDES[leaf], 0
    shape = tuple(experts[0].get_submodule(sides[0]).get_parameter("weight").shape)
    wanted = (len(experts), len(sides) * shape[0], shape[1])
    if tensor.shape != wanted:
        raise SourceError(
            f"{path}.{leaf} is {list(tensor.shape)}, config.json asks for {list(wanted)}", where=tensor.file
        )
    for index in range(len(experts)):
        for side in sides:
            piece = replace(
                tensor,
                shape=shape,
                stored_name=tensor.stored_name or f"{path}.{leaf}",
                stored_shape=tensor.shape,
                first=first,
            )
            yield f"{path}.{index}.{side}.weight", piece
            first += piece.elements
