"""Time of `kvpack calibrate` and `kvpack export` by stage, and how it grows with layers and tokens.

Writes a synthetic Llama checkpoint of the stated shape (random bf16 weights), runs the real pipeline
on it and reports the seconds of every stage:

    python benchmarks/export_speed.py gptq --layers 24 --samples 128  # the stated size
    python benchmarks/export_speed.py gptq --layers 2 --samples 16 --scale --repeat 3  # 2x work
    python benchmarks/export_speed.py rtn --layers 24 --bits 4 3 8 --repeat 5  # MB per second

A stage's seconds are those spent in its functions and not in those of another stage. They are
wrapped from outside, here; the product holds no timers. Stages in different threads overlap: "wall"
is what a user waits, "processor" what all threads together computed, the system's share included.

On a machine that others use as well, wall times mean little: `--clock cpu` gives torch one thread
and counts the processor time of every stage instead.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.synthetic_source import Shape, write_source
from kvpack import pipeline

Times = dict[str, float]
Clock = Callable[[], float]
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}

RTN_STAGES = {
    "plan": "kvpack.pipeline:make_plan",
    "check: read, hash, NaN": "kvpack.models.scan:_scan_file",
    "read": "kvpack.models.weights:SourceReader.read",
    "encode": "kvpack.parts.solvers.rtn:Rtn.solve",
    "measure error": "kvpack.packing:relative_error",
    "hash and write": "kvpack.artifact.writer:ArtifactWriter.write_tensor",
    "fsync": "os:fsync",
}
FORWARD, PACKED_FORWARD = "forward for statistics", "forward of packed block"
GPTQ_STAGES = {
    "plan": "kvpack.pipeline:make_plan",
    "check: read, hash, NaN": "kvpack.models.scan:_scan_file",
    "text": "kvpack.pipeline:_samples",
    "embed": "kvpack.calibrate.sequential:Sweep._embed",
    "load block": "kvpack.models.view:ModelView.load_block",
    "forward, stage by stage": "kvpack.calibrate.block:BlockSolver._staged",
    FORWARD: "kvpack.calibrate.passes:Passes.run",
    "gram": "kvpack.calibrate.stats:Gram.update",
    "factorise": "kvpack.ops.gptq:inverse_factor",
    "sweep": "kvpack.ops.gptq:solve",
    "output error": "kvpack.calibrate.solve:_energy",
    "store calibration": "kvpack.calibrate.writer:CalibrationWriter.flush",
    "read": "kvpack.models.weights:SourceReader.read",
    "measure error": "kvpack.packing:relative_error",
    "hash and write": "kvpack.artifact.writer:ArtifactWriter.write_tensor",
    "fsync": "os:fsync",
}


class Stages:
    """Exclusive seconds per stage, measured by wrapping functions while a block of code runs."""

    def __init__(self, places: dict[str, str], clock: Clock) -> None:
        self.places, self.clock = places, clock
        self.wall, self.processor = time.perf_counter(), time.process_time()
        self.seconds: Times = defaultdict(float)
        self._stack = threading.local()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap every place; put all back afterwards."""
        undo = []
        for stage, place in self.places.items():
            module, _, path = place.partition(":")
            *outer, name = path.split(".")
            owner: Any = importlib.import_module(module)
            for part in outer:
                owner = getattr(owner, part)
            original = getattr(owner, name)
            setattr(owner, name, self._timed(stage, original))
            undo.append((owner, name, original))
        try:
            yield
        finally:
            for owner, name, original in undo:
                setattr(owner, name, original)

    def totals(self) -> Times:
        """Everything since this was made, beside the stages."""
        wall, processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        return {**self.seconds, "wall": wall, "processor": processor}

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            here = PACKED_FORWARD if kwargs.get("keep") and stage == FORWARD else stage
            stack = self._stack.__dict__.setdefault("inner", [])
            stack.append(0.0)
            start = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.clock() - start
                self.seconds[here] += spent - stack.pop()
                if stack:
                    stack[-1] += spent

        return call


def measure_rtn(
    shape: Shape, bits: list[int], repeat: int, clock: Clock
) -> tuple[int, dict[str, list[Times]]]:
    """Times of `export --recipe w4@rtn` per width, as often as asked; and the bytes of the source."""
    runs: dict[str, list[Times]] = {f"{b}-bit": [] for b in bits}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        source.mkdir()
        size = write_source(source, shape)
        # Widths take turns, so that a machine that slows down slows them all.
        for _ in range(repeat):
            for width in bits:
                change = f"weights.0.codec.bits={width}"
                runs[f"{width}-bit"].append(_rtn(source, Path(scratch, "out"), change, clock))
    return size, runs


def _rtn(source: Path, out: Path, change: str, clock: Clock) -> Times:
    stages = Stages(RTN_STAGES, clock)
    with stages.watching():
        plan = pipeline.make_plan(source, "w4@rtn", [change])
        pipeline.export(plan, out, force=True)
    return stages.totals()


def measure_gptq(shapes: list[Shape], repeat: int, clock: Clock, *, at_once: bool) -> dict[str, list[Times]]:
    """Times of `calibrate` and `export --calibration` with the recipe w4, per shape."""
    runs: dict[str, list[Times]] = {shape.label: [] for shape in shapes}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in shapes:
            source = Path(scratch, f"source-{shape.layers}")
            if not source.exists():
                source.mkdir()
                write_source(source, shape)
        for _ in range(repeat):
            for shape in shapes:
                runs[shape.label].append(_gptq(Path(scratch), shape, clock, at_once))
                print(shape.label, runs[shape.label][-1], file=sys.stderr)
    return runs


def _gptq(scratch: Path, shape: Shape, clock: Clock, at_once: bool) -> Times:
    stages = Stages(GPTQ_STAGES, clock)
    calibration, source = scratch / "calibration", scratch / f"source-{shape.layers}"
    changes = [f"calibration.samples={shape.samples}", f"calibration.sample_tokens={shape.tokens}"]
    changes += ["calibration.sequential=false"] if at_once else []
    with stages.watching():
        plan = pipeline.make_plan(source, "w4", changes)
        pipeline.calibrate(plan, calibration, force=True)
        calibrated = stages.totals()
        pipeline.export(plan, scratch / "out", calibration=calibration, force=True)
    found = stages.totals()
    return {
        **found,
        "wall, calibrate": calibrated["wall"],
        "wall, export": found["wall"] - calibrated["wall"],
    }


def medians(runs: list[Times]) -> Times:
    """The median of every figure."""
    return {stage: statistics.median(run.get(stage, 0.0) for run in runs) for stage in runs[0]}


def table(runs: dict[str, list[Times]], ratios: bool) -> list[str]:
    """A row per stage: medians, the least wall time, and ratios to the first column if asked."""
    columns = {label: medians(found) for label, found in runs.items()}
    first = next(iter(columns.values()))
    heads = [f"{label}, s" for label in columns]
    heads += [f"{label}: ratio" for label in list(columns)[1:]] if ratios else []
    lines = [f"| stage | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for stage in first:
        cells = [f"{column[stage]:.2f}" for column in columns.values()]
        if ratios:
            cells += [f"{column[stage] / first[stage]:.2f}" for column in list(columns.values())[1:]]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return lines


def throughput(size: int, runs: dict[str, list[Times]]) -> list[str]:
    """MB of source per second, for the median and for the best run."""
    lines = ["", f"| {size / 1e6:.0f} MB of source | median | best | worst |", "|---|---|---|---|"]
    for label, found in runs.items():
        for what in ("wall", "processor"):
            times = sorted(run[what] for run in found)
            rates = [size / 1e6 / seconds for seconds in (statistics.median(times), times[0], times[-1])]
            lines.append(f"| {label}, per second of {what} | {' | '.join(f'{x:.0f} MB' for x in rates)} |")
    return lines


def heading(shape: Shape, repeat: int) -> list[str]:
    """What was run, on what."""
    return [
        f"# Time of `kvpack calibrate` and `kvpack export`, by stage: {' '.join(sys.argv[1:])}",
        "",
        f"Hidden {shape.hidden}, FFN {shape.ffn}, {shape.heads} heads of which {shape.kv_heads} for keys and "
        f"values, vocabulary {shape.vocabulary}, {shape.layers} layers; random bf16 weights. "
        f"Medians of {repeat}. {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, "
        f"Python {platform.python_version()}, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, transformers {transformers.__version__}. Files are in the page cache.",
        "",
    ]


def main() -> None:
    """Run the measurements and print or write the tables."""
    arguments = _arguments()
    shape = Shape(
        arguments.layers,
        arguments.hidden,
        arguments.ffn,
        arguments.heads,
        arguments.kv_heads,
        arguments.vocabulary,
        arguments.samples,
        arguments.tokens,
    )
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
    clock = CLOCKS[arguments.clock]
    if arguments.what == "rtn":
        size, runs = measure_rtn(shape, arguments.bits, arguments.repeat, clock)
        lines = [*table(runs, ratios=False), *throughput(size, runs)]
    else:
        more = [replace(shape, layers=2 * shape.layers), replace(shape, samples=2 * shape.samples)]
        shapes = [shape, *more] if arguments.scale else [shape]
        runs = measure_gptq(shapes, arguments.repeat, clock, at_once=arguments.at_once)
        lines = table(runs, ratios=True)
    text = "\n".join([*heading(shape, arguments.repeat), *lines]) + "\n"
    if arguments.output:
        arguments.output.write_text(text)
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["rtn", "gptq"])
    sizes = {"layers": 24, "hidden": 1024, "ffn": 2816, "heads": 16, "kv-heads": 8, "vocabulary": 32000}
    sizes |= {"samples": 128, "tokens": 512, "repeat": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bits", type=int, nargs="+", default=[4], help="rtn: widths")
    parser.add_argument("--scale", action="store_true", help="gptq: also 2x layers and 2x samples")
    parser.add_argument("--at-once", action="store_true", help="gptq: calibration.sequential=false")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="for stages")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
