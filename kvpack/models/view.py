"""A runnable model whose weights come and go: one decoder block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from kvpack.core.model_spec import ModelSpec
from kvpack.models.skeleton import build_skeleton, read_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Reader(Protocol):
    """Anything that gives tensors by checkpoint name."""

    def read(self, name: str) -> Tensor:
        """The tensor called `name`."""


class ModelView:
    """A transformers model on the meta device, filled and emptied part by part.

    Computed buffers (rotary frequencies, embedding scales) are always present. Outside the blocks
    stand the embedding, the last norm and the head; `load_outer` fills those.
    """

    def __init__(self, spec: ModelSpec, model: PreTrainedModel) -> None:
        self.spec, self.model = spec, model

    @classmethod
    def build(
        cls, spec: ModelSpec, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
    ) -> ModelView:
        """Build the empty model. It computes in `dtype`, by default the model's own."""
        config = read_config(spec.path, trust_remote_code=trust_remote_code)
        dtype = dtype or getattr(torch, spec.dtype)
        return cls(spec, build_skeleton(config, dtype, trust_remote_code=trust_remote_code))

    @property
    def base(self) -> nn.Module:
        """The model without its head: token ids to the last hidden state."""
        base: nn.Module = self.model.base_model
        return base

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation."""
        dtype: torch.dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return dtype

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder layers."""
        return [self.module(name) for name in self.spec.blocks]

    def module(self, name: str) -> nn.Module:
        """A submodule by its path."""
        module: nn.Module = self.model.get_submodule(name)
        return module

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self.module(self.spec.attention[layer].module)

    def block_tensors(self, layer: int) -> list[str]:
        """Checkpoint names of the tensors of a decoder layer."""
        block = self.spec.blocks[layer]
        return [f"{block}.{name}" for name in self.module(block).state_dict()]

    def outer_tensors(self) -> list[str]:
        """Checkpoint names of the tensors outside the decoder layers."""
        return [name for name in self.model.state_dict() if self.spec.block_of(name) is None]

    def base_tensors(self) -> list[str]:
        """Those of `outer_tensors` that `base` needs: all but an untied head."""
        return [name for name in self.outer_tensors() if name.startswith(f"{self.model.base_model_prefix}.")]

    def head_tensors(self) -> list[str]:
        """Those of `outer_tensors` that lead from the last block to the logits: not the embedding."""
        embedding = next(n for n, m in self.model.named_modules() if m is self.model.get_input_embeddings())
        return [name for name in self.outer_tensors() if not name.startswith(f"{embedding}.")]

    def load_block(self, layer: int, source: Reader, dtype: torch.dtype | None = None) -> None:
        """Fill a decoder layer from `source`, in `dtype` or the model's."""
        for name in self.block_tensors(layer):
            self.fill({name: source.read(name)}, dtype)

    def free_block(self, layer: int) -> None:
        """Empty a decoder layer."""
        self.empty(self.block_tensors(layer))

    def load_outer(
        self, source: Reader, names: list[str] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Fill what stands outside the decoder layers, or only `names` of it; tied tensors share."""
        held: dict[str, nn.Parameter] = {}
        for name in self.outer_tensors() if names is None else names:
            module, leaf = self._owner(name)
            holder = self.spec.tied.get(name, name)
            if holder in held:
                module._parameters[leaf] = held[holder]
                continue
            self.fill({name: source.read(holder)}, dtype)
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                held[holder] = parameter

    def free_outer(self) -> None:
        """Empty what stands outside the decoder layers."""
        self.empty(self.outer_tensors())

    def fill(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        """Put tensors in their places, in `dtype` or in that of what they replace."""
        for name, tensor in tensors.items():
            old = self._get(name)
            if old.shape != tensor.shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} does not fit {tuple(old.shape)}")
            self._put(name, tensor.to(dtype or old.dtype))

    def empty(self, names: list[str]) -> None:
        """Put parameters back on the meta device; their memory is free once nobody else holds it."""
        for name in names:
            old = self._get(name)
            self._put(name, torch.empty(old.shape, dtype=self.dtype, device="meta"))

    def resident(self) -> Iterator[str]:
        """Names of the parameters that are in memory."""
        return (n for n, p in self.model.named_parameters() if p.device.type != "meta")

    def _get(self, name: str) -> Tensor:
        module, leaf = self._owner(name)
        tensor = module._parameters.get(leaf)
        return module.get_buffer(leaf) if tensor is None else tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        module, leaf = self._owner(name)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.module(path), leaf
