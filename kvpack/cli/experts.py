"""What calibration tells of experts, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = 10


def expert_lines(experts: Mapping[str, Any] | None) -> list[str]:
    """How many experts were calibrated, and which of them had too few tokens of their own.

    Args:
        experts: "experts" of a calibration, or of an artifact's "calibration"; None or empty for a
            model without experts.
    """
    if not experts:
        return []
    cold: Mapping[str, int] = experts["cold"]
    if not cold:
        return [f"experts: {experts['measured']} calibrated, each by its own tokens"]
    lines = [
        f"experts: {experts['measured']} calibrated; {len(cold)} cold, with fewer than "
        f"{experts['fewest_tokens']} tokens of their own, were shown every token of their layer:"
    ]
    shown = sorted(cold.items(), key=lambda item: item[1])[:_SHOWN]
    lines += [f"  {name}: {count} tokens" for name, count in shown]
    if len(cold) > _SHOWN:
        lines.append(f"  and {len(cold) - _SHOWN} more, see --json")
    return lines
