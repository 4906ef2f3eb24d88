"""`kvpack demo`: the whole main job on the embedded model, offline."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli.console import table
from kvpack.cli.eval_ import evaluation_data
from kvpack.cli.options import Force
from kvpack.cli.run import Result, Session
from kvpack.report import human_bytes, weight_bytes

if TYPE_CHECKING:
    from kvpack.demo import Demo


def demo(
    session: Session,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="RECIPE", help="The recipe to show.")
    ] = "rotatekv-w4@4bit",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Keep the artifact here; a temporary folder otherwise."
        ),
    ] = None,
    force: Force = False,
) -> Result:
    """Run everything once on the embedded model: calibrate, export, verify, evaluate, generate."""
    from kvpack.demo import run

    if output is not None:
        done = run(recipe, output, force=force, progress=session.progress)
        return Result(_data(done), (*_lines(done, recipe), "", f"the artifact is in {output}"))
    with tempfile.TemporaryDirectory(prefix="kvpack-demo-") as scratch:
        done = run(recipe, Path(scratch, "artifact"), progress=session.progress)
        return Result(_data(done), tuple(_lines(done, recipe)))


def _data(done: Demo) -> dict[str, Any]:
    weights = weight_bytes(done.plan)
    return {
        "recipe": done.plan.recipe.recipe.name,
        "source_weight_bytes": weights.source,
        "weight_bytes": weights.total,
        "artifact_bytes": done.artifact_bytes,
        "checks": done.verification.checks,
        "evaluation": evaluation_data(done.evaluation),
        "continuations": done.continuations,
    }


def _lines(done: Demo, recipe: str) -> list[Any]:
    lines: list[Any] = []
    for item in done.continuations:
        start = f"[{item.prompt}]"
        lines += [f"source  {start}{item.source.removeprefix(item.prompt)}"]
        lines += [f"packed  {start}{item.packed.removeprefix(item.prompt)}", ""]
    return [*lines, _table(done, recipe)]


def _table(done: Demo, recipe: str) -> Any:
    """Bytes, bits per element, perplexity, KL and top-1 of source and artifact."""
    found, weights = done.evaluation, weight_bytes(done.plan)
    source_bits = 8 * weights.source / weights.parameters
    rows = [("weight bytes", human_bytes(weights.source), human_bytes(weights.total))]
    rows += [("bits per weight, all tensors", f"{source_bits:.2f}", f"{found.bits_per_weight:.2f}")]
    if done.plan.weights:
        rows += [("bits per weight, packed layers", f"{source_bits:.2f}", f"{weights.packed_bits:.2f}")]
    if found.kv_bits_per_element is not None and found.kv_bytes_per_token is not None:
        dense = done.plan.model.kv_bytes_per_token()
        rows += [("KV bytes per token", human_bytes(dense), human_bytes(found.kv_bytes_per_token))]
        rows += [("KV bits per element", f"{source_bits:.2f}", f"{found.kv_bits_per_element:.2f}")]
    for name, scores in found.packed.items():
        source = "" if found.source is None else f"{found.source.perplexity:.3f}"
        rows += [(f"perplexity ({name})", source, f"{scores.perplexity:.3f}")]
        rows += [(f"KL to source ({name})", "0", f"{scores.kl:.4f}")]
        rows += [(f"top-1 agreement ({name})", "100.0%", f"{scores.top1:.1%}")]
    return table(("demo model", "source", recipe), rows, right=("source", recipe))
