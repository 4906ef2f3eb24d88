"""What differs between model families: names of linear layers, and how fused ones are laid out.

The blocks, the attention modules, windows and norms are found by structure (`describe.py`). This
file holds the rest, as tables. Supporting a family whose layers carry other names is a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvpack.core.errors import UnsupportedModel

ROLES: Mapping[str, str] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "dense": "o",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    "fc1": "up",
    "fc2": "down",
    "c_fc": "up",
    "c_proj": "down",
    "lm_head": "lm_head",
    "embed_out": "lm_head",
}
"""Last path segment of a linear layer -> its role."""

KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
"""Names of the norm between the key projection and RoPE."""

QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")
"""Names of its counterpart for queries."""

LATENT = ("kv_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""Layers that betray latent attention, whose cache holds something else than keys and values."""

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Heads:
    """Head counts of one attention layer: H query heads, K kv heads, D head_dim."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Rows:
    """Output rows per query head, and per kv head for keys and for values; rows of the key projection."""

    query: Ranges
    key: Ranges
    value: Ranges
    total: int


def ranges(start: int, count: int, width: int, step: int = 0) -> Ranges:
    """`count` ranges of `width` rows, `step` rows apart (back to back by default)."""
    step = step or width
    return tuple((start + i * step, start + i * step + width) for i in range(count))


def separate(h: Heads) -> Rows:
    """A projection of its own for queries, keys and values: heads back to back."""
    own = ranges(0, h.kv_heads, h.head_dim)
    return Rows(ranges(0, h.heads, h.head_dim), own, own, h.kv_heads * h.head_dim)


def stacked(h: Heads) -> Rows:
    """One fused projection: all query heads, then all key heads, then all value heads."""
    key, value = h.heads * h.head_dim, (h.heads + h.kv_heads) * h.head_dim
    total = (h.heads + 2 * h.kv_heads) * h.head_dim
    return Rows(
        ranges(0, h.heads, h.head_dim),
        ranges(key, h.kv_heads, h.head_dim),
        ranges(value, h.kv_heads, h.head_dim),
        total,
    )


def interleaved(h: Heads) -> Rows:
    """One fused projection: query, key and value of head 0, then those of head 1, and so on."""
    step = 3 * h.head_dim
    return Rows(
        ranges(0, h.heads, h.head_dim, step),
        ranges(h.head_dim, h.heads, h.head_dim, step),
        ranges(2 * h.head_dim, h.heads, h.head_dim, step),
        h.heads * step,
    )


# Falcon and others use the name query_key_value for other layouts, so it is trusted per family.
FUSED: Mapping[tuple[str, str], Callable[[Heads], Rows]] = {
    ("phi3", "qkv_proj"): stacked,
    ("phi4_multimodal", "qkv_proj"): stacked,
    ("gpt_neox", "query_key_value"): interleaved,
}
"""(family, layer name) -> row layout of a fused projection."""


def fused_rows(family: str, name: str, heads: Heads) -> Rows:
    """Row layout of the fused projection `name`.

    Raises:
        UnsupportedModel: nobody has described this family's layout.
    """
    layout = FUSED.get((family, name))
    if layout is None:
        known = ", ".join(sorted({f for f, _ in FUSED}))
        raise UnsupportedModel(
            f"fused projection {name!r} of family {family!r} has no known layout",
            why="keys and values cannot be told apart in it",
            hint=f"fused layouts are known for: {known}",
        )
    return layout(heads)


ROPE_LAYERS: Mapping[str, Callable[[Any], bool]] = {
    "cohere2": lambda attention: attention.sliding_window is not None,
    "exaone4": lambda attention: attention.sliding_window is None or attention.is_sliding,
    "smollm3": lambda attention: bool(attention.use_rope),
}
"""Families that leave RoPE out in some layers: which attention modules have it."""


def has_rope(attention: Any) -> bool:
    """Whether an attention module rotates its keys."""
    return ROPE_LAYERS.get(attention.config.model_type, lambda _: True)(attention)
