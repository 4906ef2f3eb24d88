"""How a kernel is timed on a GPU, and what there is to say of it: random codes, graphs, medians."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpack.ops.packed_affine import AffineCodes

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
