"""Sparse activations as data and text: what is planned, what was calibrated, what was seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpack.cli.console import table
from kvpack.cli.describe import describe
from kvpack.recipe.build import to_mapping
from kvpack.recipe.sparsity import Activity, SparsityPlan, mean_active


def sparsity_data(plan: SparsityPlan | None) -> dict[str, Any] | None:
    """A plan of sparse activations: sites of one kind and one part as one row; None without one."""
    if plan is None:
        return None
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, site in plan.sites.items():
        module = name.rpartition(".")[2]
        row = rows.setdefault(
            (module, describe(site.thresholds)),
            {
                "module": module,
                "kind": site.kind,
                "thresholds": to_mapping(site.thresholds),
                "text": describe(site.thresholds),
                "layers": 0,
                "bytes": 0,
                "wanted": site.thresholds.keep_fraction,
                "calibrated": [],
            },
        )
        row["layers"] += 1
        row["bytes"] += site.spec.nbytes
        row["calibrated"] += [] if site.active is None else [site.active]
    return {"prefill": plan.prefill, "sites": list(rows.values())}


def sparsity_lines(data: Mapping[str, Any] | None) -> list[Any]:
    """That data for people; empty without sparse activations."""
    if data is None:
        return []
    rows = [
        (r["module"], str(r["layers"]), r["text"], f"{r['wanted']:.0%}", _range(r["calibrated"]))
        for r in data["sites"]
    ]
    columns = ("sparse activations", "layers", "thresholds", "kept", "calibrated")
    prompts = "dense" if data["prefill"] == "dense" else "sparse, too"
    return [table(columns, rows, right=("layers", "kept", "calibrated")), f"prompts: {prompts}"]


def activity_lines(activity: Mapping[str, Activity]) -> list[str]:
    """What sparse activations kept while something ran; empty where nothing was seen."""
    shares = mean_active(activity)
    if not shares:
        return []
    kept = ", ".join(f"{module} {share:.1%}" for module, share in shares.items())
    off = {n: a.active - a.wanted for n, a in activity.items() if a.active is not None}
    worst = max(off, key=lambda name: abs(off[name]))
    skips = sorted({f"{n.rpartition('.')[2]}: {a.skips}" for n, a in activity.items()})
    return [
        f"sparse activations kept: {kept}; farthest from the recipe: {off[worst]:+.1%} in {worst}",
        f"one generated token skips: {'; '.join(skips)}",
    ]


def _range(shares: list[float]) -> str:
    if not shares:
        return ""
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"
