"""JSON with one spelling: equal content gives equal bytes, and a person can still read it."""

from __future__ import annotations

import json
from typing import Any


def plain_json(value: Any) -> bytes:
    """Indented JSON with sorted keys and a newline at the end."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def table_json(sections: dict[str, Any]) -> bytes:
    """JSON with sorted keys, one line per entry of each section, so that it diffs and greps well."""
    lines = [f"{_compact(key)}: {_section(sections[key])}" for key in sorted(sections)]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8")


def _section(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f" {_compact(k)}: {_compact(value[k])}" for k in sorted(value)) + "\n}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f" {_compact(item)}" for item in value) + "\n]"
    return _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
