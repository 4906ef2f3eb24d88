"""`kvpack plan`: what an export would write, to the byte."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any

import typer

from kvpack.cli.budget import Cache, TargetBpw, TargetSize, budget_data, budget_lines, with_target
from kvpack.cli.console import table
from kvpack.cli.describe import describe, plane_text, side_text
from kvpack.cli.options import AllowDownload, Model, Overrides, RecipeOption, TrustRemoteCode
from kvpack.cli.reading import reading_data, reading_rows
from kvpack.cli.run import Result, Session
from kvpack.cli.sparsity import sparsity_data, sparsity_lines
from kvpack.core.access import Access
from kvpack.recipe.build import to_mapping
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plan import Plan, WeightPlan
from kvpack.report import KVBytes, human_bytes, kv_bytes, kv_bytes_per_token, most_read, weight_bytes

CONTEXT_TOKENS = 32_768
"""Tokens that the cache is forecast for."""


def plan(
    session: Session,
    model: Model,
    recipe: RecipeOption,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Length to forecast the KV cache for, in tokens.")
    ] = CONTEXT_TOKENS,
    overrides: Overrides = None,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    cache: Cache = None,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Forecast the size of artifact and KV cache, to the byte; writes nothing."""
    from kvpack.pipeline import make_plan

    changes = with_target(overrides or [], target_bpw, target_size)
    access = Access(allow_download, trust_remote_code)
    made = make_plan(model, recipe, changes, access, cache=cache, progress=session.progress)
    return plan_result(made, context)


def plan_result(made: Plan, context: int = CONTEXT_TOKENS) -> Result:
    """Data and text of a plan."""
    data = plan_data(made, context)
    head = f"{made.model.architecture}, {data['parameters']:,} parameters, {made.model.dtype}"
    lines: list[Any] = [f"{head}, {len(made.model.files)} files ({human_bytes(made.model.nbytes)})", ""]
    rows = [
        (r["match"], r["tensors"], r["scheme"], f"{r['bits_per_element']:.2f}", human_bytes(r["bytes"]))
        for r in data["weights"]
    ]
    total = data["artifact"]
    rows.append(("total", "", "", f"{total['bits_per_weight']:.2f}", human_bytes(total["bytes"])))
    columns = ("weights", "tensors", "scheme", "bits/w", "bytes")
    lines.append(table(columns, rows, right=("tensors", "bits/w", "bytes")))
    if data["basis"]:
        changes = [(r["at"], r["places"], r["scheme"]) for r in data["basis"]]
        lines += ["", table(("change of basis", "places", "transforms"), changes, right=("places",))]
    if data["budget"] is not None:
        lines += ["", *budget_lines(data["budget"])]
    if sparse := sparsity_lines(data["sparsity"]):
        lines += ["", *sparse, f"a generated token reads {data['read_share']:.1%} of the blocks' weights"]
    if cache := data["kv_cache"]:
        lines += ["", *_cache_lines(cache)]
    if (storage := made.recipe.recipe.storage) is not None:
        lines += ["", f"sizes are before lossless coding of packed weights: {describe(storage.packer)}"]
    if made.notes:
        lines += ["", "note:", *(f"  {note}" for note in made.notes)]
    if data["dropped"]:
        lines += ["", "not in the artifact:", *(f"  {d['name']}: {d['reason']}" for d in data["dropped"])]
    return Result(data, tuple(lines))


def plan_data(made: Plan, context: int) -> dict[str, Any]:
    """A plan as JSON data."""
    count = weight_bytes(made)
    return {
        "architecture": made.model.architecture,
        "parameters": made.model.parameters,
        "source_bytes": made.model.nbytes,
        "recipe": {"name": made.recipe.recipe.name, "sha256": made.recipe.sha256},
        "weights": _weight_rows(made),
        "basis": _basis_rows(made),
        "artifact": {"bytes": count.total, "bits_per_weight": count.bits_per_weight},
        "storage": to_mapping(made.recipe.recipe.storage),
        "budget": budget_data(made),
        "sparsity": sparsity_data(made.sparsity),
        "read_share": 1.0 if made.sparsity is None else made.sparsity.read_share(made.model.linears),
        "kv_cache": _cache_data(made, context),
        "notes": list(made.notes),
        "dropped": [{"name": d.name, "reason": d.reason} for d in made.dropped],
    }


def _weight_rows(made: Plan) -> list[dict[str, Any]]:
    rules: dict[int, list[WeightPlan]] = defaultdict(list)
    for weight in made.weights.values():
        rules[weight.rule].append(weight)
    rows = []
    for index, weights in sorted(rules.items()):
        nbytes = sum(w.nbytes for w in weights)
        elements = sum(w.linear.shape[0] * w.linear.shape[1] for w in weights)
        rows.append(
            {
                "match": made.recipe.recipe.weights[index].match,
                "tensors": len(weights),
                "scheme": _scheme_text(weights),
                "bits_per_element": 8 * nbytes / elements,
                "bytes": nbytes,
            }
        )
    copied, elements = (
        sum(t.nbytes for t in made.copied.values()),
        sum(t.elements for t in made.copied.values()),
    )
    rows.append(
        {
            "match": "all other tensors",
            "tensors": len(made.copied),
            "scheme": "as they are",
            "bits_per_element": 8 * copied / elements if elements else 0.0,
            "bytes": copied,
        }
    )
    return rows


def _basis_rows(made: Plan) -> list[dict[str, Any]]:
    """Changes of basis: where, in how many places, and by what; searched codecs are left out."""
    rows: dict[tuple[str, str, bool], int] = defaultdict(int)
    for change in made.basis:
        scheme = " > ".join(describe(t).partition(", codec (")[0] for t in change.transforms)
        rows[change.role, scheme, change.online] += 1
    return [
        {"at": at, "places": count, "scheme": f"{scheme} ({'online' if online else 'folded'})"}
        for (at, scheme, online), count in rows.items()
    ]


def _scheme_text(weights: list[WeightPlan]) -> str:
    """How a rule packs its layers, and what it does to their inputs."""
    inputs = weights[0].inputs
    packed = f"{_codecs_text(weights)}; {describe(weights[0].solver)}"
    return packed if inputs is None else f"{packed}; inputs {describe(inputs)}"


def _codecs_text(weights: list[WeightPlan]) -> str:
    """The codec of a rule's layers; where a budget gave them several widths, their range."""
    texts = dict.fromkeys(describe(w.codec) for w in weights)
    if len(texts) == 1:
        return next(iter(texts))
    widths = [getattr(w.codec, "bits", 0) for w in weights]
    return f"{describe(weights[0].codec).split()[0]}, {min(widths)} to {max(widths)} bits by budget"


def _cache_data(made: Plan, context: int) -> dict[str, Any] | None:
    if not made.kv:
        return None
    held = kv_bytes(made.kv, context, made.model.dtype)
    last = made.kv[-1]
    return {
        "layers": len(made.kv),
        "key": side_text(last, "key"),
        "value": side_text(last, "value"),
        "policy": describe(last.policy),
        "reading": reading_data(made.kv),
        "source_bytes_per_token": made.model.kv_bytes_per_token(),
        "bytes_per_token": float(kv_bytes_per_token(made.kv, made.model.dtype)),
        "context_tokens": context,
        "source_bytes": _dense_bytes(made.kv, context, made),
        "bytes": held.total,
        "bits_per_element": held.bits_per_element,
        "retrieval": _retrieval_data(made, context, held),
    }


def _retrieval_data(made: Plan, context: int, held: KVBytes) -> dict[str, Any] | None:
    found = next((layer.retrieval for layer in made.kv if layer.retrieval is not None), None)
    if found is None:
        return None
    return {
        "retriever": describe(found.retriever),
        "index": plane_text(found.index),
        "index_bytes": held.index,
        "device_bytes": held.on_device,
        "most_read": most_read(made.kv, context),
    }


def _dense_bytes(layers: tuple[KVLayerPlan, ...], context: int, made: Plan) -> int:
    """Bytes of the uncompressed cache, sliding windows respected."""
    share = made.model.kv_bytes_per_token() // sum(a.kv_heads * a.head_dim for a in made.model.attention)
    attention = [layer.attention for layer in layers]
    return sum(share * a.kv_heads * a.head_dim * min(context, a.window or context) for a in attention)


def _cache_lines(cache: dict[str, Any]) -> list[Any]:
    smaller = cache["source_bytes"] / cache["bytes"]
    per_token = f"{human_bytes(cache['source_bytes_per_token'])} -> {human_bytes(cache['bytes_per_token'])}"
    held = f"{human_bytes(cache['source_bytes'])} -> {human_bytes(cache['bytes'])}"
    rows = [
        ("keys", cache["key"]),
        ("values", cache["value"]),
        ("policy", cache["policy"]),
        *reading_rows(cache["reading"]),
        ("per token", f"{per_token} once it is encoded"),
        (f"{cache['context_tokens']:,} tokens", f"{held} ({smaller:.2f}x smaller)"),
        ("bits/element", f"{cache['bits_per_element']:.2f}, everything counted"),
    ]
    if found := cache["retrieval"]:
        rows += [
            ("each token reads", f"{found['most_read']:.1%} per head at most, by {found['retriever']}"),
            ("found by", f"{found['index']} ({human_bytes(found['index_bytes'])})"),
            ("on the device", human_bytes(found["device_bytes"])),
        ]
    return [table(("KV cache", f"{cache['layers']} layers"), rows)]
