"""Folding a change of basis of keys or values into the projections around the cache.

With ``forward`` linear and ``<dual(q), forward(v)> = <q, v>``, a model whose value rows are
``forward(W_v)`` and whose output columns are ``dual(W_o)`` computes the same function, and its
cache holds values in the new basis at no cost. (QuaRot, arXiv 2404.00456, section 4, folds a
Hadamard rotation this way; nothing here is specific to it.)

Keys have RoPE in between. Transforms that commute with it (`Transform.commutes_with_rope`) are
folded into key rows, ``forward(W_k)``, and query rows, ``dual(W_q)``. (SmoothAttention of QServe,
arXiv 2405.04532, section 4.2, folds a scale that RoPE partners share.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpack.core.errors import UnsupportedModel
from kvpack.core.model_spec import AttentionSpec, Projection
from kvpack.core.roles import Plane, Transform
from kvpack.core.types import Site, State


def fold_names(attention: AttentionSpec, plane: Plane) -> tuple[str, ...]:
    """Checkpoint tensors that folding a plane may change; biases need not exist."""
    producer = attention.key if plane == "key" else attention.value
    names = [f"{producer.linear}.weight", f"{producer.linear}.bias"]
    if plane == "value":
        return (*names, f"{attention.output.linear}.weight")
    query = attention.query.linear
    return tuple(dict.fromkeys((*names, f"{query}.weight", f"{query}.bias")))


def fold(
    plane: Plane,
    attention: AttentionSpec,
    weights: Mapping[str, Tensor],
    transforms: Sequence[Transform],
    states: Sequence[State],
) -> dict[str, Tensor]:
    """`fold_key` or `fold_value`."""
    return (fold_key if plane == "key" else fold_value)(attention, weights, transforms, states)


def fold_key(
    attention: AttentionSpec,
    weights: Mapping[str, Tensor],
    transforms: Sequence[Transform],
    states: Sequence[State],
) -> dict[str, Tensor]:
    """Fold key transforms into the key and query projections of one layer.

    Args:
        attention: where the heads are.
        weights: checkpoint tensors by name: weights and biases of the two projections, which may
            be one, or any of them. Others are left out of the result.
        transforms: applied in order; linear, with a dual, keeping the head layout and commuting
            with RoPE.
        states: their states.

    Returns:
        The folded ones of these tensors, in float32.

    Raises:
        UnsupportedModel: a norm stands between projections and RoPE, or a transform does not
            commute with RoPE.
    """
    if attention.key_norm or not attention.value_linear:
        raise UnsupportedModel(
            "keys are normed between projection and RoPE",
            where=attention.module,
            why="a change of basis cannot be folded across it",
        )
    for transform in transforms:
        if not transform.commutes_with_rope:
            raise UnsupportedModel(
                f"{type(transform).__name__} does not commute with RoPE", why="it cannot be folded"
            )
    basis = _Basis(attention, transforms, states)
    folded = {}
    for name in fold_names(attention, "key"):
        if name not in weights:
            continue
        linear, kind = name.rsplit(".", 1)
        rows = weights[name][:, None] if kind == "bias" else weights[name]
        if linear == attention.key.linear:
            rows = _fold_rows(rows, attention.key, basis)
        if linear == attention.query.linear:
            rows = _fold_query_rows(rows, basis)
        folded[name] = rows[:, 0] if kind == "bias" else rows
    return folded


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
    basis = _Basis(attention, transforms, states)
    value, output = attention.value.linear, f"{attention.output.linear}.weight"
    folded = {}
    for name, tensor in weights.items():
        if name == output:
            folded[name] = _fold_columns(tensor, basis)
        elif name == f"{value}.weight":
            folded[name] = _fold_rows(tensor, attention.value, basis)
        elif name == f"{value}.bias":
            folded[name] = _fold_rows(tensor[:, None], attention.value, basis)[:, 0]
    return folded


@dataclass(frozen=True)
class _Basis:
    """The transforms of one layer, one after another."""

    attention: AttentionSpec
    transforms: Sequence[Transform]
    states: Sequence[State]

    def forward(self, heads: Tensor) -> Tensor:
        """Vectors [B, K, N, D] of kv heads in the new basis."""
        for transform, state in zip(self.transforms, self.states, strict=True):
            heads = _same(transform.forward(heads, state, self._at), heads, transform)
        return heads

    def dual(self, flat: Tensor) -> Tensor:
        """The duals of vectors [H, N, D] of all query heads: those of one kv head go to the batch."""
        kv_heads = self.attention.kv_heads
        shape = (kv_heads, self.attention.heads // kv_heads, *flat.shape[1:])
        heads = flat.reshape(shape).transpose(0, 1).contiguous()
        for transform, state in zip(self.transforms, self.states, strict=True):
            heads = _dual(transform, heads, state, self._at)
        return heads.transpose(0, 1).reshape(flat.shape)

    @property
    def _at(self) -> Site:
        return Site(self.attention.layer, kv_heads=self.attention.kv_heads)


def _fold_rows(weight: Tensor, projection: Projection, basis: _Basis) -> Tensor:
    """Producer side. Rows of every kv head become [1, K, C, D]: each input channel is one 'token'."""
    out = weight.float().clone()
    heads = basis.forward(torch.stack([out[a:b].T for a, b in projection.heads])[None])
    for head, (a, b) in zip(heads[0], projection.heads, strict=True):
        out[a:b] = head.T
    return out


def _fold_query_rows(weight: Tensor, basis: _Basis) -> Tensor:
    """Reader side of keys. Rows become [H, C, D]."""
    out, query = weight.float().clone(), basis.attention.query
    flat = basis.dual(torch.stack([out[a:b].T for a, b in query.heads]))
    for head, (a, b) in zip(flat, query.heads, strict=True):
        out[a:b] = head.T
    return out


def _fold_columns(weight: Tensor, basis: _Basis) -> Tensor:
    """Reader side of values. Columns become [H, R, D], as rows of queries do."""
    out, output = weight.float().clone(), basis.attention.output
    flat = basis.dual(torch.stack([out[:, a:b] for a, b in output.heads]))
    for head, (a, b) in zip(flat, output.heads, strict=True):
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
