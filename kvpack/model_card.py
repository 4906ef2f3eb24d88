"""The README.md of an artifact: what it is, how big, how to run it. The same bytes every time."""

from __future__ import annotations

import json

from kvpack.recipe.plan import Plan
from kvpack.report import human_bytes, kv_bytes, kv_bytes_per_token, weight_bytes

CONTEXT_TOKENS = 4096
"""Context for which the card states the cache's size."""


def model_card(plan: Plan, stored_bytes: int) -> str:
    """Markdown with the metadata block that model hubs read.

    `stored_bytes` are those of all weights, after lossless coding.
    """
    recipe = plan.recipe.recipe
    metadata = ["library_name: transformers", "tags: [kvpack, compressed, kv-cache]"]
    if plan.model.repository:
        metadata += [f"base_model: {json.dumps(plan.model.repository)}", "base_model_relation: quantized"]
    variant = f"@{plan.recipe.variant}" if plan.recipe.variant else ""
    lines = ["---", *metadata, "---", "", f"# {plan.model.architecture}, {recipe.name}{variant}", ""]
    if recipe.summary:
        lines += [recipe.summary, ""]
    lines += ["Packed with [kvpack](https://pypi.org/project/kvpack/); needs it to load:", ""]
    lines += ["```python", "import kvpack", "", 'model = kvpack.load("path/to/this/folder")', "```", ""]
    lines += _sizes(plan, stored_bytes) + _recipe(plan)
    lines += ["", "`kvpack verify` checks every byte, `kvpack inspect` shows the layers.", ""]
    return "\n".join(lines)


def _sizes(plan: Plan, stored_bytes: int) -> list[str]:
    weights = weight_bytes(plan)
    lines = [
        "| | source | here | bits per element |",
        "|---|---|---|---|",
        f"| weights | {human_bytes(weights.source)} | {human_bytes(stored_bytes)} "
        f"| {8 * stored_bytes / weights.parameters:.2f} |",
    ]
    if plan.kv:
        per_token = kv_bytes_per_token(plan.kv, plan.model.dtype)
        held = kv_bytes(plan.kv, CONTEXT_TOKENS, plan.model.dtype)
        source = plan.model.kv_bytes_per_token()
        lines += [
            f"| KV cache, one more token | {source} B | {float(per_token):.1f} B "
            f"| {float(8 * per_token / (held.elements / held.tokens)):.2f} |",
            f"| KV cache, {CONTEXT_TOKENS} tokens | {human_bytes(source * CONTEXT_TOKENS)} "
            f"| {human_bytes(held.total)} | {held.bits_per_element:.2f} |",
        ]
    return [*lines, "", "Everything stored is counted: scales, zeros, exact windows, sinks, positions."]


def _recipe(plan: Plan) -> list[str]:
    recipe = plan.recipe.recipe
    lines = []
    if recipe.paper:
        arxiv = f" (arXiv {recipe.paper.arxiv})" if recipe.paper.arxiv else ""
        lines += ["", f"Method: {recipe.paper.title}{arxiv}."]
    if recipe.fidelity:
        lines += [f"Fidelity: {recipe.fidelity.level}."]
        lines += [f"- {deviation}" for deviation in recipe.fidelity.deviations]
    if plan.dropped:
        lines += ["", "Tensors of the source that are not here:"]
        lines += [f"- `{d.name}`: {d.reason}" for d in plan.dropped]
    return lines
