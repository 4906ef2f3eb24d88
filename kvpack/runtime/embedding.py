"""Token embeddings that stay packed, and layers that share a packed weight with another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from kvpack.core import weight_code
from kvpack.core.errors import UsageError
from kvpack.runtime.linear import PackedLinear, PackedTensors, PackedWeight, replace_linears


class PackedEmbedding(PackedTensors, nn.Embedding):
    """Rows of a packed weight [V, C]: only those that are asked for are decoded.

    `pack_embedding` turns an embedding into one. It keeps its class beside this one, so that whatever
    that class does with the rows (Gemma scales them) is done as before.
    """

    like: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # torch declares an attribute
        """No rows at all: dtype, device and width are what other code may ask an embedding for."""
        empty = torch.empty(0, self.embedding_dim, dtype=self.like.dtype, device=self.like.device)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers would fill it
        return empty

    def forward(self, ids: Tensor) -> Tensor:
        """The rows [..., C] of token ids [...], in the model's dtype."""
        places = ids.reshape(-1)
        codec, shape = self.packed.codec, self.packed.shape
        rows = weight_code.decode_rows(codec, self.stored, shape, places, self.like.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)


_PACKED: dict[type[nn.Embedding], type[nn.Embedding]] = {nn.Embedding: PackedEmbedding}
"""Classes of embeddings, and the same with their rows looked up by `PackedEmbedding`."""


def pack_embedding(table: nn.Embedding, weight: PackedWeight | PackedTensors) -> None:
    """Turn an embedding into a `PackedEmbedding`, with buffers on the meta device.

    Args:
        table: changed in place; its dense weight goes.
        weight: what is packed, or the module whose packed weight it shares.
    """
    like = torch.empty(0, dtype=table.weight.dtype, device=table.weight.device)
    del table.weight
    kind = type(table)
    if kind not in _PACKED:
        _PACKED[kind] = type(f"Packed{kind.__name__}", (kind, PackedEmbedding), {})
    table.__class__ = _PACKED[kind]
    packed = cast(PackedEmbedding, table)
    packed.register_buffer("like", like, persistent=False)
    if isinstance(weight, PackedTensors):
        packed.borrow(weight)
    else:
        packed.hold(weight, "meta")


def replace_packed(model: nn.Module, packed: Mapping[str, PackedWeight], tied: Mapping[str, str]) -> None:
    """Put packed weights, with buffers on the meta device, into linear layers and embeddings.

    Args:
        model: usually a skeleton on the meta device; changed in place.
        packed: what to put there, by module path.
        tied: names of weights, and of those that hold their data; where these are packed, both
            layers compute with the one packed weight.

    Raises:
        UsageError: a path does not lead to a layer of that shape.
    """
    tables = {n: t for n in packed if isinstance(t := model.get_submodule(n), nn.Embedding)}
    for name, table in tables.items():
        if tuple(table.weight.shape) != tuple(packed[name].shape):
            raise UsageError(
                f"{name} is {tuple(table.weight.shape)}", why=f"the packed weight is {packed[name].shape}"
            )
        pack_embedding(table, packed[name])
    replace_linears(model, {name: weight for name, weight in packed.items() if name not in tables})
    for name, holder in tied.items():
        if (owner := holder.removesuffix(".weight")) in packed:
            _share(model, name.removesuffix(".weight"), cast(PackedTensors, model.get_submodule(owner)))


def _share(model: nn.Module, name: str, owner: PackedTensors) -> None:
    old = model.get_submodule(name)
    if isinstance(old, nn.Embedding):
        pack_embedding(old, owner)
    else:
        model.set_submodule(name, PackedLinear(owner, cast("nn.Parameter | None", old.bias)))
