"""Folding a change of basis of the values into the projections around the cache.

With ``forward`` linear and ``<dual(q), forward(v)> = <q, v>``, a model whose value rows are
``forward(W_v)`` and whose output columns are ``dual(W_o)`` computes the same function, and its
cache holds values in the new basis at no cost. (QuaRot, arXiv 2404.00456, section 4, folds a
Hadamard rotation this way; nothing here is specific to it.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpack.core.errors import UnsupportedModel
from kvpack.core.model_spec import AttentionSpec, Projection
from kvpack.core.roles import Transform
from kvpack.core.types import Site, State


def fold_value(
    attention: AttentionSpec,
    weights: Mapping[str, Tensor],
    transforms: Sequence[Transform],
    states: Sequence[State],
) -> dict[str, Tensor]:
    """Fold value transforms into the value and output projections of one layer.

    Args:
        attention: where the heads are.
        weights: checkpoint tensors by name: the two weights and the value bias, or any of them.
            Others are left out of the result.
        transforms: applied in order; linear, with a dual, and keeping the head layout.
        states: their states.

    Returns:
        The folded ones of these tensors, in float32.

    Raises:
        UnsupportedModel: the layer puts something non-linear between its values and its output.
    """
    if not attention.value_linear:
        raise UnsupportedModel(
            "a norm or gate stands between values and output projection",
            where=attention.module,
            why="a change of basis cannot be folded across it",
        )
    at = Site(attention.layer, kv_heads=attention.kv_heads)
    value, output = attention.value.linear, f"{attention.output.linear}.weight"
    folded = {}
    for name, tensor in weights.items():
        if name == output:
            folded[name] = _fold_columns(tensor, attention, transforms, states, at)
        elif name == f"{value}.weight":
            folded[name] = _fold_rows(tensor, attention.value, transforms, states, at)
        elif name == f"{value}.bias":
            folded[name] = _fold_rows(tensor[:, None], attention.value, transforms, states, at)[:, 0]
    return folded


def _fold_rows(
    weight: Tensor,
    projection: Projection,
    transforms: Sequence[Transform],
    states: Sequence[State],
    at: Site,
) -> Tensor:
    """Producer side. Rows of every kv head become [1, K, C, D]: each input channel is one 'token'."""
    out = weight.float().clone()
    heads = torch.stack([out[a:b].T for a, b in projection.heads])[None]
    for transform, state in zip(transforms, states, strict=True):
        heads = _same(transform.forward(heads, state, at), heads, transform)
    for head, (a, b) in zip(heads[0], projection.heads, strict=True):
        out[a:b] = head.T
    return out


def _fold_columns(
    weight: Tensor,
    attention: AttentionSpec,
    transforms: Sequence[Transform],
    states: Sequence[State],
    at: Site,
) -> Tensor:
    """Consumer side. Columns become [H/K, K, R, D]: heads that share a kv head go to the batch."""
    out = weight.float().clone()
    flat = torch.stack([out[:, a:b] for a, b in attention.output.heads])
    shape = (attention.kv_heads, attention.heads // attention.kv_heads, *flat.shape[1:])
    heads = flat.reshape(shape).transpose(0, 1).contiguous()
    for transform, state in zip(transforms, states, strict=True):
        heads = _dual(transform, heads, state, at)
    flat = heads.transpose(0, 1).reshape(flat.shape)
    for head, (a, b) in zip(flat, attention.output.heads, strict=True):
        out[:, a:b] = head
    return out


def _same(after: Tensor, before: Tensor, transform: Transform) -> Tensor:
    if after.shape != before.shape:
        raise UnsupportedModel(
            f"{type(transform).__name__} changes the layout of the heads", why="it cannot be folded"
        )
    return after


def _dual(transform: Transform, columns: Tensor, state: State, at: Site) -> Tensor:
    dual = transform.dual(columns, state, at) if transform.linear else None
    if dual is None:
        raise UnsupportedModel(f"{type(transform).__name__} has no linear dual", why="it cannot be folded")
    return _same(dual, columns, transform)
