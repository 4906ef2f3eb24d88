"""Sensitivities that were measured before, found by everything that they depend on.

One JSON file per measurement, written beside its name and renamed: whoever reads sees a whole file or
none, and of two writers either may be the last. A file that is damaged, or that was made for something
else, is as good as none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvpack.core.errors import KvpackError
from kvpack.core.new_file import write_text
from kvpack.core.strict_json import parse_json
from kvpack.recipe.budget import Options, with_bits
from kvpack.recipe.build import to_mapping
from kvpack.recipe.recipe import BudgetRecipe

FORMAT = 1
"""Changes whenever the same key would give other numbers."""

Key = dict[str, Any]
Found = dict[str, dict[int, float]]


def key_of(options: Options, budget: BudgetRecipe, hashes: Mapping[str, str], tokens: str) -> Key:
    """Everything that sensitivities depend on; the target is not in it.

    Args:
        options: the layers and their widths.
        budget: allocator and rounding.
        hashes: sha256 of the model's weight files.
        tokens: sha256 of the samples.
    """
    layers = {}
    for name, codecs in options.codecs.items():
        codec = with_bits(next(iter(codecs.values())), next(iter(codecs)))
        solver = to_mapping(options.plan.weights[name].solver) if budget.rounding != "nearest" else None
        layers[name] = [to_mapping(codec), sorted(codecs), solver]
    return {
        "format": FORMAT,
        "model files": dict(sorted(hashes.items())),
        "text": tokens,
        "allocator": to_mapping(budget.allocator),
        "rounding": budget.rounding,
        "layers": layers,
    }


def path_of(folder: Path, key: Key) -> Path:
    """The file of a key."""
    return folder / "sensitivities" / f"{_digest(key)}.json"


def read(folder: Path, key: Key) -> Found | None:
    """What was measured for a key; None when there is nothing, or nothing sound."""
    try:
        path = path_of(folder, key)
        stored = parse_json(path.read_bytes(), where=str(path), error=KvpackError)
        content = {"key": stored["key"], "losses": stored["losses"]}
        if stored["sha256"] != _digest(content) or _digest(content["key"]) != _digest(key):
            return None
        found = {n: {int(bits): float(x) for bits, x in v.items()} for n, v in content["losses"].items()}
    except (OSError, KvpackError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    wanted = {name: codecs for name, (_, codecs, _) in key["layers"].items()}
    return found if {name: sorted(losses) for name, losses in found.items()} == wanted else None


def write(folder: Path, key: Key, losses: Mapping[str, Mapping[int, float]]) -> None:
    """Keep a measurement; where the folder cannot be written, the next run measures again."""
    content = {"key": key, "losses": {n: {str(b): x for b, x in v.items()} for n, v in losses.items()}}
    path = path_of(folder, key)
    with suppress(OSError, KvpackError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**content, "sha256": _digest(content)}) + "\n")


def _digest(value: Any) -> str:
    raw = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(raw.encode()).hexdigest()
