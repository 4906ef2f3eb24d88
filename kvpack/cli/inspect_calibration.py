"""What is inside a calibration: where it comes from, its layers, and measured attention sinks."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpack.cli.console import table
from kvpack.cli.experts import expert_lines
from kvpack.cli.run import Result
from kvpack.cli.sinks import sink_lines
from kvpack.core.errors import ArtifactError
from kvpack.core.strict_json import parse_json
from kvpack.report import human_bytes

CALIBRATION_FILE, SINKS_FILE = "calibration.json", "sinks.json"
_OUTSIDE = "outside"


def inspect_calibration(path: Path) -> Result:
    """Show a calibration folder from its JSON files alone.

    Raises:
        ArtifactError: a file is missing, changed or not what a calibration holds.
    """
    file = path / CALIBRATION_FILE
    content = parse_json(file.read_bytes(), where=str(file), error=ArtifactError)
    try:
        linears = {
            str(name): entry.get("relative_output_error") for name, entry in content["linears"].items()
        }
        data: dict[str, Any] = {
            "type": "calibration",
            "identity": dict(content["identity"]),
            "tokens": content["tokens"],
            "data": dict(content["data"]),
            "solved_layers": len(linears),
            "output_errors": linears,
            "kv_layers": len(content["kv"]),
            "experts": content.get("experts"),
            "active": {name: entry["active"] for name, entry in content.get("thresholds", {}).items()},
            "bytes": sum((path / name).stat().st_size for name in content["files"]),
            "versions": dict(content["versions"]),
            "sinks": _sinks(path, content["files"]),
        }
        lines = _lines(path, data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
        raise ArtifactError("is not a sound calibration", where=str(file), why=repr(error)) from error
    return Result(data, tuple(lines))


def _sinks(path: Path, files: Mapping[str, str]) -> Any:
    """The report of attention sinks; None where none was made."""
    if SINKS_FILE not in files:
        return None
    raw = (path / SINKS_FILE).read_bytes()
    if hashlib.sha256(raw).hexdigest() != files[SINKS_FILE]:
        raise ArtifactError(
            "its content changed since it was written",
            where=str(path / SINKS_FILE),
            hint="run kvpack calibrate again",
        )
    return parse_json(raw, where=str(path / SINKS_FILE), error=ArtifactError)


def _solved(layers: int, sequential: bool | None) -> str:
    order = "in order" if sequential else "those of a block at once"
    return f"{layers}, {order}" if layers else "0"


def _lines(path: Path, data: dict[str, Any]) -> list[Any]:
    identity = data["identity"]
    digests = {name: identity[name] for name in ("weight parts", "kv_cache transforms") if name in identity}
    rows = [
        ("text", f"{identity.get('data')}, {data['tokens']:,} tokens, seed {identity.get('seed')}"),
        ("model files", ", ".join(f"{n} {h[:12]}" for n, h in identity.get("model files", {}).items())),
        *((name, str(digest)[:12]) for name, digest in digests.items()),
        ("solved layers", _solved(data["solved_layers"], identity.get("sequential"))),
        ("KV layers", data["kv_layers"]),
        ("size", human_bytes(data["bytes"])),
        ("made by", ", ".join(f"{name} {version}" for name, version in data["versions"].items())),
    ]
    lines: list[Any] = [table(("calibration", str(path)), rows)]
    if errors := {name: e for name, e in data["output_errors"].items() if e is not None}:
        lines += ["", _error_table(errors)]
    if found := expert_lines(data["experts"]):
        lines += ["", *found]
    if data["sinks"] is not None:
        lines += ["", *sink_lines(data["sinks"])]
    return lines


def _error_table(errors: Mapping[str, float]) -> Any:
    """Output errors of the solved linear layers, one row per decoder layer."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for name, error in errors.items():
        found = re.search(r"\.(\d+)\.", name)
        groups[found[1] if found else _OUTSIDE][name] = error
    rows = []
    for layer, group in sorted(groups.items(), key=lambda item: (item[0] == _OUTSIDE, len(item[0]), item[0])):
        worst = max(group, key=lambda name: group[name])
        mean = sum(group.values()) / len(group)
        rows.append((layer, len(group), f"{mean:.4f}", f"{group[worst]:.4f}", worst))
    columns = ("layer", "solved", "mean output error", "worst", "in")
    return table(columns, rows, right=columns[:-1])
