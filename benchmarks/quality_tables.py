"""The tables of `quality.py` as Markdown and JSON, in files where other text survives."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.quality_entries import COLUMNS, TITLES
from kvpack.evaluate.scores import Scores

BUILTIN = "builtin:stdlib"


@dataclass(frozen=True)
class Subject:
    """A model with its texts, ready to measure."""

    name: str
    path: Path
    text: str
    calibration: str
    calibration_name: str
    source: Any
    pieces: list[Tensor]
    decode_pieces: list[Tensor]

    @property
    def samples(self) -> int:
        """Calibration samples; half a small text file does not hold more."""
        return 128 if self.calibration == BUILTIN else 96

    @property
    def group(self) -> int:
        """A group size that a single head can fill."""
        config = self.source.config
        return min(32, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Row:
    """One line of a table: scores, and what was stored. None is what a row does not have."""

    label: str
    overrides: tuple[str, ...]
    scores: Scores
    weight_bits: float
    kv_bits: float | None = None
    kv_bytes_per_token: float | None = None
    step_tokens: int | None = None
    key_error: float | None = None


def markdown(subject: Subject, section: str, rows: Sequence[Row]) -> str:
    """One table, with a line that says what was measured."""
    pieces = subject.decode_pieces if section == "decode" else subject.pieces
    tokens = sum(len(piece) - 1 for piece in pieces)
    lines = [
        f"### {subject.name}: {TITLES[section]}",
        "",
        f"{tokens:,} tokens of {subject.text} in {len(pieces)} chunks of at most {max(map(len, pieces))}; "
        f"calibrated on {subject.calibration_name}; {str(subject.source.dtype).removeprefix('torch.')}.",
        "",
    ]
    columns = COLUMNS[section]
    lines += ["| recipe | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    lines += [f"| {row.label} | " + " | ".join(_cell(row, c) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(row: Row, column: str) -> str:
    if column == "perplexity":
        return f"{row.scores.perplexity:.3f}"
    if column == "KL":
        return f"{row.scores.kl:.4f}"
    if column == "top-1":
        return f"{row.scores.top1:.1%}"
    value = {
        "key error": row.key_error,
        "KV bits": row.kv_bits,
        "KV bytes/token": row.kv_bytes_per_token,
        "weight bits": row.weight_bits,
    }[column]
    if value is None:
        return ""
    return (
        f"{value:.1%}" if column == "key error" else f"{value:.0f}" if "bytes" in column else f"{value:.2f}"
    )


def write_blocks(file: Path, blocks: dict[str, str]) -> None:
    """Put each block between its markers in `file`; new ones are added at the end."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        marked = f"{begin}\n{block}\n{end}"
        if begin in text:
            pattern = re.escape(begin) + ".*?" + re.escape(end)
            text = re.sub(pattern, lambda _, new=marked: new, text, flags=re.DOTALL)
        else:
            text += ("\n" if text else "") + marked + "\n"
    file.write_text(text, encoding="utf-8")


def write_json(file: Path, made_with: dict[str, str], models: dict[str, Any]) -> None:
    """Write all rows; models and tables that this run did not measure stay as they are."""
    known = json.loads(file.read_text(encoding="utf-8"))["models"] if file.exists() else {}
    merged = known | {name: known.get(name, {}) | found for name, found in models.items()}
    file.write_text(json.dumps({"versions": made_with, "models": merged}, indent=1) + "\n", encoding="utf-8")
