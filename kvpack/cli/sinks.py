"""Attention sinks of a calibration for people: a table per layer, and a map of layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.text import Text

from kvpack.cli.console import table

_RAMP = " .:-=+*#%@"
_COLOURS = (
    "grey15",
    "blue",
    "dodger_blue2",
    "dark_cyan",
    "green",
    "chartreuse3",
    "yellow",
    "orange1",
    "red",
    "red",
)


def sink_lines(report: Mapping[str, Any]) -> list[Any]:
    """Lines for the report that `kvpack.calibrate.sinks` writes.

    Raises:
        KeyError, TypeError, IndexError, ValueError: it is not such a report.
    """
    layers: Sequence[Mapping[str, Any]] = report["layers"]
    epsilon, listed = float(report["epsilon"]), list(report["positions"])
    lines: list[Any] = [
        f"attention sinks on {report['samples']} samples of {report['tokens']} tokens: a position is a sink "
        f"of a head that gives it more than {epsilon:.0%} of the mean attention",
        table(_COLUMNS, [_row(layer) for layer in layers], right=_COLUMNS[:-1]),
        "",
        *_summary(report, listed),
        "",
        "mean attention that the first position draws, layers down, heads across: "
        + ", ".join(f"{_RAMP[level]} {level * level} %" for level in (1, 3, 5, 7, 9)),
    ]
    lines += [_map_row(layer["layer"], [head[0] for head in layer["attention"]]) for layer in layers]
    return lines


_COLUMNS = ("layer", "heads", "sink 1", "sink 2+", "hidden", "key norm", "value norm", "key channel", "which")


def _row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """Shares of heads with sinks; norms of position 1, and the strongest key channel, over medians."""
    rates = layer["sink_rate"]
    first = sum(head[0] for head in rates) / len(rates)
    later = sum(max(head[1:], default=0.0) for head in rates) / len(rates)
    ratios = (layer[f"{name}_norm_ratio"] for name in ("hidden", "key", "value"))
    channel, head, index = strongest_channel(layer["key_channel_max"])
    return (
        str(layer["layer"]),
        str(len(rates)),
        f"{first:.0%}",
        f"{later:.0%}",
        *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        f"{channel:.1f}x",
        f"head {head}, channel {index}",
    )


def strongest_channel(heads: Sequence[Sequence[float]]) -> tuple[float, int, int]:
    """The largest key channel beside the median one of its kv head: ratio, head, channel."""
    ratios = (
        (top / middle, head, row.index(top))
        for head, row in enumerate(heads)
        if (top := max(row)) and (middle := median(row)) > 0
    )
    return max(ratios, default=(1.0, 0, 0))


def _summary(report: Mapping[str, Any], listed: Sequence[int]) -> list[str]:
    """What to do about it, positions counted from 1."""
    rate = report["sink_rate"]
    lines = [f"Sink 1: {rate[0]:.1%} of all heads; n_sink {report['n_sink']}"]
    if listed:
        shares = ", ".join(f"{at + 1} ({rate[at]:.0%})" for at in listed)
        lines.append(f"positions that at least 5 % of the heads take for sinks: {shares}")
        lines.append(f"to keep them exact: --set kv_cache.policy.sink_tokens={report['n_sink']}")
    else:
        lines.append("no position is a sink for 5 % of the heads: exact first tokens promise little here")
    if long := report.get("long"):
        found = ", ".join(str(at + 1) for at in long["positions"]) or "none"
        lines.append(f"on {long['samples']} samples of {long['tokens']} tokens: {found}")
    if later := report["later_tokens"]:
        words = ", ".join(f"{t.get('text', t['token'])!r} ({t['count']})" for t in later)
        lines.append(f"tokens that are sinks elsewhere, times a head: {words}")
    return lines


def _map_row(layer: int, shares: Sequence[float]) -> Text:
    """One layer of the map; colours show in terminals only, the characters everywhere."""
    line = Text(f"{layer:>5}  ")
    for share in shares:
        level = min(int(10 * share**0.5 + 1e-9), 9)
        line.append(_RAMP[level] * 2, style=f"on {_COLOURS[level]}")
    return line.append("|")
