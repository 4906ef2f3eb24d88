"""Build, check and time the GPU's kernels in one go.

    python benchmarks/gpu_kernels.py --out results     # on a machine with a CUDA GPU
    python benchmarks/gpu_kernels.py --dry-run         # the checks alone, tiny, through the interpreter

Every kernel is compared with decoded numbers in float64 before it is timed; a wrong one is reported
and not timed. Times are medians of replayed CUDA graphs over several sets of buffers, together at
least four times the L2 cache, so codes come from memory and launches cost nothing. "eager" is one
call from Python, launches included. Roofline: stored bytes over time, against a large copy's bytes
(read and written) over its time, measured in the same run. Without a GPU the exit code is 2.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu_cases import jobs
from benchmarks.gpu_timing import GPU, LIMIT, TOLERANCE, Bench, Row


def environment(bench: Bench) -> dict[str, object]:
    """Versions, chip, clocks."""
    found: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    found["triton"] = metadata.version("triton")
    found["mode"] = "checks only, not timed" if bench.dry else "timed"
    if bench.dry:
        return found
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "chip": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": bench.cache,
        "cuda": torch.version.cuda,
        "copy_bytes_per_second": bench.bandwidth,
    }
    query = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,driver_version,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found[query] = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        found[query] = f"unknown: {error}"
    return found


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| kernel | shape | error | time, us | eager, us | baseline, us | times faster | of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{x:.1f}" if x is not None else "-" for x in (row.time, row.eager, row.baseline_time)]
        ratio = f"{row.ratio:.2f}" if row.ratio else "-"
        roof = f"{row.roofline:.0%}" if row.roofline else "-"
        cells = [row.what, row.shape, f"{row.error:.1e}", *times, ratio, roof]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run all; 0 if every check passed, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for gpu_kernels.json and gpu_kernels.md")
    parser.add_argument("--dry-run", action="store_true", help="check tiny shapes on the CPU, time nothing")
    options = parser.parse_args()
    if not GPU and not options.dry_run:
        print(
            "no CUDA GPU here: nothing can be timed (--dry-run checks the kernels without one)",
            file=sys.stderr,
        )
        return 2
    bench = Bench(options.dry_run)
    facts = environment(bench)
    rows: list[Row] = []
    skipped = 0
    for job in jobs(bench.dry):
        if bench.late():
            skipped += 1
            continue
        rows.append(job(bench))
        if not bench.dry:
            torch.cuda.empty_cache()
            print(rows[-1], file=sys.stderr, flush=True)
    failed = [row for row in rows if not row.error <= TOLERANCE]
    text = "\n".join([*(f"{name}: {value}" for name, value in facts.items()), "", table(rows)])
    print(text)
    print(f"\n{len(rows)} checked, {len(failed)} wrong, {skipped} left out after {LIMIT} s")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {"environment": facts, "skipped": skipped, "rows": [asdict(row) for row in rows]}
        (options.out / "gpu_kernels.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
        (options.out / "gpu_kernels.md").write_text(text + "\n", encoding="utf8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
