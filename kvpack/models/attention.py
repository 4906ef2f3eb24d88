"""Finding the attention of each decoder block, and where keys and values come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvpack.core.errors import UnsupportedModel
from kvpack.core.model_spec import AttentionSpec, Projection
from kvpack.models.families import (
    KEY_NORMS,
    LATENT,
    QUERY_NORMS,
    ROLES,
    Heads,
    Rows,
    fused_rows,
    ranges,
    separate,
)


def describe_attention(
    model: PreTrainedModel, config: Any, blocks: tuple[str, ...]
) -> Iterator[AttentionSpec]:
    """Describe the attention of every decoder block.

    Raises:
        UnsupportedModel: a block without attention, latent attention, an unknown fused layout, a
            projection of an unexpected size, or a cache that does not hold keys and values.
    """
    caches = DynamicCache(config=config).layers
    if len(caches) != len(blocks):
        raise UnsupportedModel(
            f"{len(blocks)} decoder blocks but {len(caches)} cache layers",
            where=type(model).__name__,
        )
    for layer, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
        name, module = _attention_module(model, block)
        kind, window = _window(layer, cache, config)
        yield _describe(name, module, block, layer, config, kind, window)


def _attention_module(model: PreTrainedModel, block: str) -> tuple[str, nn.Module]:
    """The module of `block` that knows its layer index and owns a key projection."""
    root = model.get_submodule(block)
    for suffix, module in root.named_modules():
        children = {name for name, _ in module.named_children()}
        if children & set(LATENT):
            raise UnsupportedModel(
                f"{type(module).__name__} is latent attention (MLA)",
                where=f"{block}.{suffix}",
                why="its cache holds latents, not keys and values",
            )
        roles = {ROLES.get(child) for child in children}
        if hasattr(module, "layer_idx") and ("qkv" in roles or {"k", "v"} <= roles):
            return f"{block}.{suffix}", module
    raise UnsupportedModel(
        f"{type(root).__name__} has no attention with key and value projections",
        where=block,
        why="kvpack handles softmax attention only, not state-space, linear or convolution layers",
    )


def _window(layer: int, cache: Any, config: Any) -> tuple[Literal["full", "sliding"], int | None]:
    """Window of a layer, as transformers' own cache for this configuration has it."""
    types = getattr(config, "layer_types", None)
    kind = types[layer] if types else None
    if kind == "chunked_attention" or (kind is None and getattr(config, "attention_chunk_size", None)):
        raise UnsupportedModel("chunked attention is not supported", where=f"layer {layer}")
    if type(cache) is DynamicSlidingWindowLayer:
        return "sliding", int(cache.sliding_window)
    if type(cache) is DynamicLayer:
        return "full", None
    raise UnsupportedModel(
        f"its cache is a {type(cache).__name__}",
        where=f"layer {layer}",
        why="it does not simply hold this layer's keys and values",
    )


def _describe(
    name: str,
    module: nn.Module,
    block: str,
    layer: int,
    config: Any,
    kind: Literal["full", "sliding"],
    window: int | None,
) -> AttentionSpec:
    linears = {ROLES[n]: n for n, m in module.named_children() if isinstance(m, nn.Linear) and n in ROLES}
    heads = _heads(name, module, config, linears)
    rows, sources = _rows(name, module, config.model_type, heads, linears)
    if "o" not in linears:
        raise UnsupportedModel("attention has no output projection of a known name", where=name)
    output = ranges(0, heads.heads, heads.head_dim)
    if "q" in linears:
        _check_width(f"{name}.{linears['q']}", module.get_submodule(linears["q"]), "out", output[-1][1])
    _check_width(f"{name}.{linears['o']}", module.get_submodule(linears["o"]), "in", output[-1][1])
    return AttentionSpec(
        layer=layer,
        module=name,
        block=block,
        kind=kind,
        window=window,
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        query=Projection(f"{name}.{sources[0]}", rows.query),
        key=Projection(f"{name}.{sources[1]}", rows.key),
        value=Projection(f"{name}.{sources[2]}", rows.value),
        output=Projection(f"{name}.{linears['o']}", output),
        key_norm=any(hasattr(module, norm) for norm in KEY_NORMS),
        value_linear=not _strangers(module) and getattr(config, "clip_qkv", None) is None,
    )


def _strangers(module: nn.Module) -> list[str]:
    """Children that may act between values and output: neither a projection nor a query or key norm."""
    return [
        name
        for name, child in module.named_children()
        if name not in ROLES
        and name not in (*KEY_NORMS, *QUERY_NORMS)
        and not isinstance(child, nn.Dropout)
        and not type(child).__name__.endswith("RotaryEmbedding")
    ]


def _heads(name: str, module: nn.Module, config: Any, linears: dict[str, str]) -> Heads:
    """Head counts; the module's own attributes come before the configuration's."""
    heads = int(config.num_attention_heads)
    default = getattr(config, "head_dim", None) or config.hidden_size // heads
    head_dim = int(getattr(module, "head_dim", None) or getattr(module, "head_size", None) or default)
    if "k" in linears:
        width = module.get_submodule(linears["k"]).out_features
        if not isinstance(width, int) or width % head_dim:
            raise UnsupportedModel(f"key projection of {width} rows, head_dim {head_dim}", where=name)
        return Heads(heads, width // head_dim, head_dim)
    return Heads(heads, int(getattr(config, "num_key_value_heads", None) or heads), head_dim)


def _rows(
    name: str, module: nn.Module, family: str, heads: Heads, linears: dict[str, str]
) -> tuple[Rows, tuple[str, str, str]]:
    """Where query, key and value rows are, and the names of the layers that hold them."""
    if "qkv" in linears:
        rows, source = fused_rows(family, linears["qkv"], heads), linears["qkv"]
        sources = (source, source, source)
    elif "q" in linears:
        rows, sources = separate(heads), (linears["q"], linears["k"], linears["v"])
    else:
        raise UnsupportedModel("attention has no query projection of a known name", where=name)
    for source in sources[1:]:
        _check_width(f"{name}.{source}", module.get_submodule(source), "out", rows.total)
    return rows, sources


def _check_width(where: str, linear: nn.Module, side: str, expected: int) -> None:
    width = getattr(linear, f"{side}_features")
    if width != expected:
        raise UnsupportedModel(
            f"has {width} {side}put channels, expected {expected}",
            where=where,
            why="the heads cannot be told apart",
        )
