"""The architecture without its weights: a transformers model whose parameters take no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvpack.core.errors import SourceError, UnsupportedModel
from kvpack.models.experts import take_apart


def read_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the configuration of a model folder.

    Raises:
        SourceError: config.json is missing or not understood.
        UnsupportedModel: an encoder-decoder, or weights that are quantised already.
    """
    if not (path / "config.json").is_file():
        raise SourceError("config.json is missing", where=str(path), hint="is this a model folder?")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = "--trust-remote-code runs code from the model folder" if "remote" in str(error) else ""
        raise SourceError("config.json is not understood", where=str(path), why=reason, hint=hint) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{config.model_type!r} is an encoder-decoder", where=str(path), hint="kvpack takes causal models"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            "the checkpoint is quantised already", where=str(path), hint="start from the unquantised model"
        )
    return config


def build_skeleton(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal model with parameters on the meta device and computed buffers in memory.

    Experts that transformers fuses are taken apart (`kvpack.models.experts`).

    Raises:
        UnsupportedModel: transformers has no causal model for the configuration.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UnsupportedModel(
            f"transformers has no causal language model for {config.model_type!r}",
            why=str(error).strip().splitlines()[0],
        ) from error
    take_apart(model)
    model.requires_grad_(False)
    model.eval()
    return model


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers: the longest whose members know their layer index.

    Raises:
        UnsupportedModel: there is none.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_has_index(m) for m in module)
    ]
    if not found:
        raise UnsupportedModel(
            f"no decoder blocks found in {type(model).__name__}",
            why="no list of modules contains attention with a layer_idx",
        )
    return max(found, key=lambda item: len(item[1]))


def _has_index(module: nn.Module) -> bool:
    return any(hasattr(m, "layer_idx") for m in module.modules())
