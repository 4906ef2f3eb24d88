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
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from kvpack.ops.packed_affine import AffineCodes, dense

GPU = torch.cuda.is_available() and "--dry-run" not in sys.argv
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which no module above does

LIMIT = 420
"""Seconds after which nothing new is started."""
TOLERANCE = 5e-3
"""Largest error over the largest output: half-precision products and bfloat16 results."""
Call = Callable[[], object]


@dataclass
class Row:
    """One kernel at one shape; times in microseconds."""

    what: str
    shape: str
    error: float
    baseline: str
    time: float | None = None
    eager: float | None = None
    baseline_time: float | None = None
    ratio: float | None = None
    stored_bytes: int = 0
    roofline: float | None = None


class Bench:
    """Where and how long: device, generator, copy bandwidth, deadline."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        # The interpreter cuts bfloat16 off instead of rounding, which no bound should have to allow.
        self.dtype = torch.float16 if dry else torch.bfloat16
        self.device = "cuda" if GPU else "cpu"
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.deadline = time.monotonic() + LIMIT
        self.cache = 0 if dry else torch.cuda.get_device_properties(0).L2_cache_size
        self.bandwidth = None if dry else self._copy_bandwidth()

    def _copy_bandwidth(self) -> float:
        """Bytes read and written per second by a copy of 2 GiB."""
        source, target = (torch.empty(1 << 31, dtype=torch.uint8, device=self.device) for _ in range(2))
        source.random_(generator=self.generator)
        return 2 * source.numel() / (self.median([lambda: target.copy_(source)]) * 1e-6)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gaussian numbers."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def codes(
        self, outer: tuple[int, ...], channels: int, bits: int, axis: str, size: int, zero: bool
    ) -> AffineCodes:
        """Random codes whose numbers are about Gaussian with deviation 1."""
        *rest, tokens = outer
        width = (channels * bits + 7) // 8
        grid = (
            (*rest, tokens // size, channels)
            if axis == "token"
            else (*outer, -(-channels // (size or channels)))
        )
        codes = torch.randint(
            0, 256, (*outer, width), generator=self.generator, device=self.device, dtype=torch.uint8
        )
        step = math.sqrt(12) / 2**bits
        scale = (step * (0.5 + torch.rand(grid, generator=self.generator, device=self.device))).half()
        low = (-scale * (2**bits - 1) / 2 + 0.1 * self.normal(*grid)).half() if zero else None
        return AffineCodes(codes, scale, low, bits, axis, size, channels)

    def sets(self, size: int) -> int:
        """Sets of buffers of `size` bytes that together are four times the cache."""
        return 1 if self.dry else max(2, min(64, -(-4 * self.cache // size)))

    def median(self, calls: list[Call], repeats: int = 15) -> float:
        """Median microseconds of one of `calls`, which are recorded in one graph."""
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / len(calls))
        return statistics.median(times)

    @staticmethod
    def eager(call: Call, repeats: int = 20) -> float:
        """Microseconds of a call from Python, one after the other."""
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats * 1e6

    def timed(self, row: Row, calls: list[Call], baselines: list[list[Call]]) -> Row:
        """Fill in the times, unless the row is wrong or nothing is to be timed."""
        if self.dry or not row.error <= TOLERANCE:
            return row
        row.time, row.eager = self.median(calls), self.eager(calls[0])
        row.baseline_time = min(self.median(calls) for calls in baselines)
        row.ratio = row.baseline_time / row.time
        row.roofline = row.stored_bytes / (row.time * 1e-6) / self.bandwidth
        return row

    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline


def size_of(*codes: AffineCodes) -> int:
    """Stored bytes."""
    return sum(t.nbytes for x in codes for t in (x.codes, x.scale, x.zero) if t is not None)


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected number; NaN stays NaN."""
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def attention(bench: Bench, bits: int, batch: int, tokens: int, heads: int = 8, width: int = 128) -> Row:
    """A decode step over keys grouped along 32 tokens and values along 32 channels, 4 heads each."""
    from kvpack.kernels.triton.affine_attention import affine_attention

    def fresh() -> tuple[Tensor, AffineCodes, AffineCodes]:
        outer = (batch, heads, tokens)
        query = bench.normal(batch, heads, 4, width, dtype=torch.bfloat16)
        keys = bench.codes(outer, width, bits, "token", 32, zero=True)
        return query, keys, bench.codes(outer, width, bits, "channel", 32, zero=True)

    first = fresh()
    stored = size_of(*first[1:])
    inputs = [first, *(fresh() for _ in range(bench.sets(stored) - 1))]
    row = Row(
        f"attention, {bits}-bit kv", f"batch {batch}, {tokens} tokens", attention_error(*first), "sdpa bf16",
        stored_bytes=stored,
    )  # fmt: skip
    if bench.dry:
        return row
    calls = [lambda one=one: affine_attention(*one) for one in inputs]
    return bench.timed(row, calls, sdpa(bench, batch, tokens, heads, width))


def attention_error(query: Tensor, keys: AffineCodes, values: AffineCodes) -> float:
    """Of the first and of the last kv head, against float64."""
    from kvpack.kernels.triton.affine_attention import affine_attention

    acc, _, total = affine_attention(query, keys, values)
    out = acc / total[..., None]
    errors = []
    for at in (slice(0, 1), slice(-1, None)):
        k, v = (
            dense(
                x._replace(codes=x.codes[at, at], scale=x.scale[at, at], zero=x.zero[at, at]), torch.float32
            ).double()
            for x in (keys, values)
        )
        scores = query[at, at].double() @ k.mT * query.shape[-1] ** -0.5
        errors.append(relative(out[at, at], torch.softmax(scores, -1) @ v))
    return max(errors, key=lambda x: math.inf if math.isnan(x) else x)


def sdpa(bench: Bench, batch: int, tokens: int, heads: int, width: int) -> list[list[Call]]:
    """Attention of torch over bfloat16, once with grouped heads and once with heads as query rows."""
    count = bench.sets(4 * batch * heads * tokens * width)
    sets = [
        tuple(bench.normal(batch, heads, t, width, dtype=torch.bfloat16) for t in (4, tokens, tokens))
        for _ in range(count)
    ]
    grouped = [
        lambda q=q, k=k, v=v: scaled_dot_product_attention(
            q.reshape(batch, -1, 1, width), k, v, enable_gqa=True
        )
        for q, k, v in sets
    ]
    rows = [lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v) for q, k, v in sets]
    return [grouped, rows]


def w4a16(bench: Bench, inputs: int, rows: int, channels: int) -> Row:
    """Weights of 4 bits in groups of 128 channels, bfloat16 inputs."""
    from kvpack.kernels.triton.affine_matmul import affine_matmul

    x = bench.normal(inputs, channels, dtype=bench.dtype)
    first = bench.codes((rows,), channels, 4, "channel", 128, zero=True)
    weights = [
        first,
        *(
            bench.codes((rows,), channels, 4, "channel", 128, zero=True)
            for _ in range(bench.sets(size_of(first)) - 1)
        ),
    ]
    error = relative(affine_matmul(x, first), x.double() @ dense(first, torch.float32).double().mT)
    row = Row(
        f"W4A16, {inputs} inputs", f"{rows} x {channels}", error, "linear bf16", stored_bytes=size_of(first)
    )
    calls = [lambda w=w: affine_matmul(x, w) for w in weights]
    return bench.timed(row, calls, [dense_linear(bench, x, rows)])


def w8a8(bench: Bench, inputs: int, rows: int, channels: int) -> Row:
    """Weights of 8 bits with a scale a row, int8 inputs that are already rounded."""
    from kvpack.kernels.triton.int8_matmul import int8_matmul

    x = torch.randint(
        -127, 128, (inputs, channels), generator=bench.generator, device=bench.device, dtype=torch.int8
    )
    steps = bench.normal(inputs).abs() / 40
    first = bench.codes((rows,), channels, 8, "channel", 0, zero=False)
    weights = [
        first,
        *(
            bench.codes((rows,), channels, 8, "channel", 0, zero=False)
            for _ in range(bench.sets(size_of(first)) - 1)
        ),
    ]
    expected = (x.double() * steps.double()[:, None]) @ dense(first, torch.float32).double().mT
    error = relative(int8_matmul(x, steps, first, bench.dtype), expected)
    row = Row(
        f"W8A8, {inputs} inputs", f"{rows} x {channels}", error, "linear bf16", stored_bytes=size_of(first)
    )
    calls = [lambda w=w: int8_matmul(x, steps, w, bench.dtype) for w in weights]
    return bench.timed(row, calls, [dense_linear(bench, x.bfloat16(), rows)])


def dense_linear(bench: Bench, x: Tensor, rows: int) -> list[Call]:
    """The same product of bfloat16 numbers."""
    if bench.dry:
        return []
    weights = [
        bench.normal(rows, x.shape[1], dtype=torch.bfloat16) for _ in range(bench.sets(2 * rows * x.shape[1]))
    ]
    return [lambda w=w: linear(x, w) for w in weights]


def jobs(dry: bool) -> list[Callable[[Bench], Row]]:
    """All measurements, the most wanted first."""
    if dry:
        return [
            *(lambda b, bits=bits: attention(b, bits, 1, 96, 2, 64) for bits in (2, 4)),
            *(lambda b, n=n: w4a16(b, n, 72, 256) for n in (1, 20)),
            *(lambda b, n=n: w8a8(b, n, 72, 256) for n in (1, 20)),
        ]
    lengths = (131072, 65536, 32768)
    shapes = ((4096, 4096), (14336, 4096), (4096, 14336))
    decode = [(bits, batch, tokens) for tokens in lengths for batch in (1, 8) for bits in (2, 4)]
    linears = [(kind, n, *shape) for n in (1, 8, 64, 1024) for shape in shapes for kind in (w4a16, w8a8)]
    return [
        *(lambda b, job=job: attention(b, *job) for job in decode),
        *(lambda b, job=job: job[0](b, *job[1:]) for job in linears),
    ]


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
