"""Lossless coding of packed weights: bytes on disk and in memory, and what unpacking ahead costs.

Exports a model with every recipe, loads it with several limits, and reports what was saved, the
predicted time of a token and the measured one, beside the time with everything unpacked:

    python benchmarks/lossless.py --output docs/results/lossless.md
    python benchmarks/lossless.py --model MODEL --recipes lossless

Without --model, a wide model of random bf16 weights is made (12 layers, 1024 channels).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpack
from kvpack import pipeline
from kvpack.loading.residency import Residency, step_seconds

CODED_INT8 = {
    "kvpack": 1,
    "name": "int8-zstd",
    "weights": [
        {
            "match": "@linear",
            "codec": {"kind": "affine", "bits": 8, "group": {"axis": "channel", "size": 0}, "zero": "none"},
            "solver": {"kind": "rtn"},
        }
    ],
    "storage": {"packer": {"kind": "zstd"}},
}
"""8-bit codes, one scale per row, each with zstd."""

LIMITS: tuple[dict[str, Any], ...] = (
    {"resident": "compressed"},
    {"max_slowdown": 0.05},
    {"max_slowdown": 0.5},
    {"max_slowdown": 2.0},
)


def write_source(folder: Path, layers: int, hidden: int) -> Path:
    """A Llama of random weights; a few input channels are large, as in trained models."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=4096,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[:, :: weight.shape[1] // 8] *= 8
    model.save_pretrained(folder)
    return folder


def rows(source: Path, recipe: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """One export, and a line per way of loading it."""
    start = time.perf_counter()
    made = pipeline.export(pipeline.make_plan(source, recipe), folder)
    seconds, linears = time.perf_counter() - start, made.manifest.weights.values()
    ratio = sum(x.unpacked_nbytes for x in linears) / sum(x.nbytes for x in linears)
    base = step_seconds(kvpack.load(folder))
    name = Path(recipe).stem
    disk = f"{made.manifest.totals.weight_bytes / 1e6:.1f} MB, {ratio:.3f}x, {seconds:.1f} s"
    yield name, disk, "raw", "0", "", "", f"{1000 * base:.2f} ms"
    for limit in LIMITS:
        model = kvpack.load(folder, **limit)
        found: Residency = model.kvpack_residency
        saved = f"{found.saved_bytes / 1e6:.1f} of {found.raw_bytes / 1e6:.1f} MB"
        measured = step_seconds(model)
        predicted = ""
        if found.predicted_seconds and found.base_seconds:
            predicted = f"{1000 * found.predicted_seconds:.2f} ms"
            predicted += f" ({found.predicted_seconds / found.base_seconds - 1:+.1%})"
        what = ", ".join(f"{key}={value}" for key, value in limit.items())
        share = f"{len(found.packed)} of {found.layers}: {saved}"
        yield name, "", what, share, predicted, f"{measured / base - 1:+.1%}", f"{1000 * measured:.2f} ms"


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["lossless", "int8-zstd"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    columns = (
        "recipe",
        "weights on disk",
        "in memory",
        "layers kept coded: saved",
        "predicted",
        "slower by",
        "token",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "int8-zstd.yaml").write_text(json.dumps(CODED_INT8))
        source = given.model or write_source(folder / "source", given.layers, given.hidden)
        recipes = [str(folder / "int8-zstd.yaml") if r == "int8-zstd" else r for r in given.recipes]
        found = [row for i, r in enumerate(recipes) for row in rows(source, r, folder / f"artifact-{i}")]
    load = f"load average {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads of torch"
    head = f"{given.model or f'random, {given.layers} layers of {given.hidden} channels'}; "
    lines = [f"{head}{platform.machine()}, {os.cpu_count()} CPUs, {load}.", ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(row)} |" for row in found]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
