"""Peak memory of `kvpack export` against the number of layers.

Writes synthetic Llama checkpoints with random bf16 weights (24 layers come to more than 2 GB),
exports each in a fresh process, and reports that process's peak resident memory:

    python benchmarks/export_memory.py --recipe w4@rtn --output docs/results/export_memory.md

The bound is 1 GiB plus three times the largest tensor, and 24 layers must not need more than 12.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.synthetic_source import Shape, write_source

GIB = 2**30
SHAPE = Shape(layers=1, hidden=2048, ffn=5632, heads=32, kv_heads=8, vocabulary=32000, samples=0, tokens=2048)


@dataclass(frozen=True)
class Run:
    """One export: its size, its peak resident memory, its time."""

    layers: int
    source_bytes: int
    artifact_bytes: int
    peak_bytes: int
    seconds: float


def export(source: Path, out: Path, recipe: list[str], layers: int, source_bytes: int) -> Run:
    """Export in a fresh process and read its peak memory from the operating system."""
    code = (
        "import sys; sys.argv = ['kvpack', *sys.argv[1:]]\n"
        "from kvpack.cli import main\n"
        "from kvpack.core.memory import peak_memory_bytes\n"
        "try:\n    main()\n"
        "finally:\n    print('PEAK', peak_memory_bytes())\n"
    )
    command = [sys.executable, "-c", code, "export", str(source), *recipe, "-o", str(out)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"export failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")
    peak = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK"))
    size = sum(f.stat().st_size for f in out.iterdir())
    return Run(layers, source_bytes, size, peak, seconds)


def report(runs: list[Run], recipe: list[str]) -> str:
    """A Markdown table with the bound beside each measurement."""
    largest = SHAPE.vocabulary * SHAPE.hidden * 2
    bound = GIB + 3 * largest
    lines = [
        f"# Peak memory of `kvpack export MODEL {' '.join(recipe)}`",
        "",
        f"Command: `python benchmarks/export_memory.py {' '.join(recipe)}`. "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.get_num_threads()} threads.",
        "",
        f"Bound: 1 GiB + 3 x largest tensor ({largest / 2**20:.0f} MiB) = {bound / 2**20:.0f} MiB.",
        "",
        "| layers | source | artifact | peak resident | bound | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.layers} | {r.source_bytes / 1e9:.2f} GB | {r.artifact_bytes / 1e9:.2f} GB | "
        f"{r.peak_bytes / 2**20:.0f} MiB | {'met' if r.peak_bytes <= bound else 'EXCEEDED'} | "
        f"{r.seconds:.1f} |"
        for r in runs
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the measurements and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="w4@rtn")
    parser.add_argument("--set", action="append", default=[], help="as of kvpack export")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    recipe = ["--recipe", arguments.recipe, *(word for change in arguments.set for word in ("--set", change))]
    runs = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch, "source")
            source.mkdir()
            size = write_source(source, replace(SHAPE, layers=layers))
            runs.append(export(source, Path(scratch, "out"), recipe, layers, size))
            print(runs[-1], file=sys.stderr)
    text = report(runs, recipe)
    if arguments.output:
        arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
