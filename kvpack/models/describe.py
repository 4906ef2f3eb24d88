"""From a model reference to a `ModelSpec`, by structure and from file headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpack.core.errors import SourceError
from kvpack.core.model_spec import LinearSpec, ModelSpec, SourceTensor
from kvpack.models.accounting import account, rename
from kvpack.models.attention import describe_attention
from kvpack.models.families import ROLES
from kvpack.models.sites import describe_sites, final_norm
from kvpack.models.skeleton import build_skeleton, decoder_blocks, read_config
from kvpack.models.source import read_checkpoint, resolve

_DTYPES = ("float32", "float16", "bfloat16")


def open_model(
    reference: str | Path, *, allow_download: bool = False, trust_remote_code: bool = False
) -> ModelSpec:
    """Describe a model without reading its weights.

    Args:
        reference: a local folder, or a hub id with an optional ``@revision``.
        allow_download: fetch what is not in the local hub cache.
        trust_remote_code: let transformers run code from the model folder.

    Raises:
        SourceError: the folder is missing, incomplete or inconsistent.
        UnsupportedModel: the architecture has something that kvpack cannot handle, by name.
    """
    path, revision = resolve(reference, allow_download=allow_download)
    config = read_config(path, trust_remote_code=trust_remote_code)
    stored = read_checkpoint(path)
    dtype = _dtype(path, config, stored)
    model = build_skeleton(config, getattr(torch, dtype), trust_remote_code=trust_remote_code)
    name, blocks = decoder_blocks(model)
    tensors = rename(model, stored)
    tied, ignored = account(path, model, tensors)
    text = config.get_text_config(decoder=True)
    paths = tuple(f"{name}.{i}" for i in range(len(blocks)))
    linears, attention = _linears(model, paths), tuple(describe_attention(model, text, paths))
    return ModelSpec(
        path=path,
        family=text.model_type,
        architecture=type(model).__name__,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_positions=int(getattr(text, "max_position_embeddings", 0) or 0),
        dtype=dtype,
        rope_type=_rope_type(text),
        tensors=tensors,
        linears=linears,
        attention=attention,
        blocks=paths,
        sites=tuple(describe_sites(model, linears, attention)),
        final_norm=final_norm(model),
        embedding=_embedding(model),
        tied=tied,
        ignored=ignored,
        repository=None if revision is None else str(reference).partition("@")[0],
        revision=revision,
    )


def _dtype(path: Path, config: Any, tensors: dict[str, SourceTensor]) -> str:
    """Dtype that the model runs in: the configuration's, else the one most weights have."""
    stated = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    dtype = stated or max(sizes, key=lambda d: sizes[d], default="float32")
    odd = sorted({d for d in [dtype, *sizes] if d.startswith("float8") or d in ("uint8", "int8")})
    if odd or dtype not in _DTYPES:
        raise SourceError(
            f"weights are {odd[0] if odd else dtype}",
            where=str(path),
            hint=f"kvpack reads unquantised weights: {', '.join(_DTYPES)}",
        )
    return dtype


def _rope_type(text: Any) -> str:
    """Kind of RoPE: "default", "llama3", ...; several joined by "+"; "none" without RoPE."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    kinds = {str(p.get("rope_type", "default")) for p in (nested or [parameters]) if p}
    return "+".join(sorted(kinds)) or "none"


def _linears(model: PreTrainedModel, blocks: tuple[str, ...]) -> tuple[LinearSpec, ...]:
    """Every linear layer with a known role, in the model's order; others are copied as they are."""
    found = []
    for name, module in model.named_modules():
        role = ROLES.get(name.rpartition(".")[2])
        layer = next((i for i, b in enumerate(blocks) if name.startswith(b + ".")), None)
        if isinstance(module, nn.Linear) and role and (layer is not None or role == "lm_head"):
            shape = (module.out_features, module.in_features)
            found.append(LinearSpec(name, role, shape, layer, module.bias is not None))
    return tuple(found)


def _embedding(model: PreTrainedModel) -> str:
    """Name of the token embedding's weight; empty where it is more than a table of rows."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or table.max_norm is not None:
        return ""
    return next(f"{n}.weight" for n, m in model.named_modules() if m is table)
