"""Seeing what attention is given, through transformers' own attention registry.

Queries never reach a cache, so whoever needs them (saliency, retrieval, calibration of
query-aware codebooks) watches the attention function itself. `observe` registers a function that
calls the watcher of the module, if it has one, and then the model's former attention function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpack.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    Observer = Callable[
        [Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor, Tensor | None] | None
    ]
    """(query [B, H, T, D], key and value [B, K, S, D], mask or None, scaling) -> what attention
    shall read instead: key, value and mask; None leaves them as they are."""

    Reader = Callable[[Tensor, Tensor | None, float, float | None, Tensor | None], Tensor | None]
    """(query [B, H, T, D], mask or None, scaling, softcap, sink scores [H]) -> attention [B, T, H, D];
    None leaves it to the model."""

PREFIX = "kvpack_"
_OBSERVER = "_kvpack_observer"
_READER = "_kvpack_reader"
_WRAPPED = ("sdpa", "eager")
_UNREAD = ("position_bias", "indices", "block_indices", "sinks")
"""Arguments of some families' attention that change what is read, in ways no `Reader` knows."""


def observe(model: Any) -> None:
    """Route the attention of a transformers model through observers; its results stay the same.

    Raises:
        UnsupportedModel: the model does not use the registry, or an implementation that takes no
            general masks.
    """
    inner = model.config._attn_implementation
    if inner.startswith(PREFIX):
        return
    if inner not in _WRAPPED:
        raise UnsupportedModel(
            f"attention implementation {inner!r} cannot be observed",
            where=type(model).__name__,
            hint="load the model with attn_implementation='sdpa'",
        )
    name = PREFIX + inner
    AttentionInterface.register(name, _through(inner))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UnsupportedModel(
            f"{type(model).__name__} does not use transformers' attention registry",
            why="its queries cannot be seen",
        )


def observable(model: Any) -> bool:
    """Whether `observe` can work: the implementation in use takes general masks."""
    inner = str(model.config._attn_implementation)
    return inner in _WRAPPED or inner.startswith(PREFIX)


def set_observer(attention: nn.Module, observer: Observer | None) -> None:
    """Let `observer` see every call of one attention module from now on; None ends it."""
    attention.__dict__[_OBSERVER] = observer


def set_reader(attention: nn.Module, reader: Reader) -> None:
    """Let `reader` compute attention of one module wherever it can."""
    attention.__dict__[_READER] = reader


def is_routed(model_config: Any) -> bool:
    """Whether attention goes through the functions of this module."""
    return str(model_config._attn_implementation).startswith(PREFIX)


@contextmanager
def watch(attention: nn.Module, observer: Observer) -> Iterator[None]:
    """Let `observer` see the calls of one attention module for a while."""
    before = attention.__dict__.get(_OBSERVER)
    set_observer(attention, observer)
    try:
        yield
    finally:
        set_observer(attention, before)


def visible(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Which keys each query attends to, bool [B or 1, H or 1, T, S].

    Args:
        mask: as attention is given it: additive, bool, or None for plain causal attention.
        query: [B, H, T, D].
        key: [B, K, S, D].
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        last = torch.arange(keys - queries, keys, device=query.device)
        return (torch.arange(keys, device=query.device) <= last[:, None])[None, None]
    mask = mask[..., :keys]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _through(inner: str) -> Callable[..., Any]:
    """An attention function that asks the module's observer first."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        reader = module.__dict__.get(_READER)
        if reader is not None and all(kwargs.get(name) is None for name in _UNREAD):
            out = reader(query, attention_mask, scale, kwargs.get("softcap"), kwargs.get("s_aux"))
            if out is not None:
                return out, None
        observer = module.__dict__.get(_OBSERVER)
        if observer is not None:
            seen = observer(query, key, value, attention_mask, scale)
            key, value, attention_mask = (key, value, attention_mask) if seen is None else seen
        return _function(inner, module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return forward


def _function(inner: str, module: nn.Module) -> Callable[..., Any]:
    """The model's former attention function; each family brings its own eager one."""
    if inner == "eager":
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if own is None:
            raise UnsupportedModel(
                f"the module of {type(module).__name__} has no eager_attention_forward",
                hint="load the model with attn_implementation='sdpa'",
            )
        return own  # type: ignore[no-any-return]  # looked up by name
    shared: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[inner]
    return shared
