"""How attention reads a cache, and why not faster, for `plan` and `inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from kvpack.recipe.kv_plan import KVLayerPlan

_WAYS = {
    "codes": "codes as they are stored",
    "rows": "codes, brought back a few rows at a time",
    "blocks": "codes, decoded block by block",
    "dense": "decoded as a whole, by the model's own attention",
}


def reading_data(layers: Sequence[KVLayerPlan]) -> list[dict[str, Any]]:
    """Layers that are read the same way, as one row; the most common way first."""
    found = Counter(layer.reading for layer in layers)
    return [
        {"layers": count, "key": way.key, "value": way.value, "why": way.why or None}
        for way, count in found.most_common()
    ]


def reading_rows(data: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The same as rows of a table of two columns."""
    rows = []
    for row in data:
        head = "attention reads" if len(data) == 1 else f"{row['layers']} layers read"
        if row["key"] == row["value"]:
            rows.append((head, _WAYS[row["key"]]))
        else:
            rows.append((head, f"keys: {_WAYS[row['key']]}; values: {_WAYS[row['value']]}"))
        if row["why"]:
            rows.append(("because", row["why"]))
    return rows
