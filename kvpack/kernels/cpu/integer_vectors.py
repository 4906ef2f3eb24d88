"""Vector code that multiplies packed codes with 16-bit integers; see `integer_rows`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu import vectors
from kvpack.kernels.cpu.codes import LANES, WORDS, constant, load, unpack_fields
from kvpack.kernels.cpu.frames import TOGETHER, UNROLLED, UNROLLED_STEP, field_span, integer_key
from kvpack.kernels.cpu.jit import ADDRESS, F32, I32, I64, device

SUMS = LANES // 2
"""Partial sums of a product: two neighbours are added as they are multiplied."""
PAIRS = ir.VectorType(I32, SUMS)
HALVES = ir.VectorType(F32, SUMS)
_AHEAD = 2048
"""Bytes by which codes are asked for before they are needed."""


def _pair_products(builder: Any, a: Any, b: Any) -> Any:
    """Products of 16-bit integers, each added to its neighbour's: eight 32-bit sums."""
    if vectors.has_avx2():
        return vectors.call(builder, "llvm.x86.avx2.pmadd.wd", PAIRS, [a, b])
    wide = ir.VectorType(I32, LANES)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (constant(PAIRS, range(first, LANES, 2)) for first in (0, 1))
    return builder.add(
        builder.shuffle_vector(product, product, even), builder.shuffle_vector(product, product, odd)
    )


@device
def version(key: Any, count: Any) -> Any:
    """The version for `count` vectors, of which only one has code without inner loops."""
    return key + 1 if count == 1 else (key & ~(3 * UNROLLED_STEP)) + count


def _versions() -> Iterator[int]:
    """All versions: every width, with and without whole words, number of vectors, and chunk."""
    for bits in vectors.WIDTHS:
        for fields in (1, 16 // bits) if bits in (2, 4, 8) else (1,):
            for chunk in (0, *UNROLLED):
                if fields == 1 or not chunk or field_span(bits, chunk) > LANES:
                    yield from (integer_key(bits, fields, chunk) + n for n in ((1,) if chunk else TOGETHER))


class _Version:
    """Emits the products of one version; addresses and sizes as in `row`."""

    def __init__(self, builder: Any, arguments: Any, bits: int, fields: bool, count: int, chunk: int) -> None:
        self.builder, self.bits, self.count = builder, bits, count
        self.span = LANES * (16 // bits) if fields else LANES
        self.codes, x, stride, self.weights, self.starts, self.line, self.chunks = arguments[:7]
        size, self.out, _ = arguments[7:]
        self.chunk: Any = chunk if chunk else size
        self.lines = [builder.add(x, builder.mul(stride, I64(2 * n))) for n in range(count)]

    def emit(self) -> None:
        """All chunks, then the sums of every product."""
        builder = self.builder
        each = range(self.count)
        starts = [load(builder, builder.add(self.starts, I64(4 * SUMS * n)), HALVES) for n in each]
        totals = vectors.loop(builder, self.chunks, 1, starts, self._chunk)
        for n in each:
            vectors.store(builder, vectors.total(builder, totals[n]), builder.add(self.out, I64(4 * n)))

    def _chunk(self, index: Any, totals: list[Any]) -> list[Any]:
        """Totals with the products of one more chunk, weighted."""
        builder, bits = self.builder, self.bits
        size = I64(self.chunk) if isinstance(self.chunk, int) else self.chunk
        first = builder.mul(index, size)
        place = builder.lshr(builder.mul(first, I64(bits)), I64(3))
        source = builder.add(self.codes, place)
        for line in range(0, self.chunk * bits // 8 if isinstance(self.chunk, int) else 1, 64):
            vectors.prefetch(builder, builder.add(source, I64(_AHEAD + line)))
        numbers = [builder.add(line, builder.mul(first, I64(2))) for line in self.lines]
        held = [constant(PAIRS, [0] * SUMS)] * len(totals)
        if isinstance(self.chunk, int):
            for at in range(0, self.chunk, self.span):
                held = self._step(source, numbers, I64(at), held)
        else:
            held = vectors.loop(
                builder, size, self.span, held, lambda at, sums: self._step(source, numbers, at, sums)
            )
        weight = builder.add(self.weights, builder.mul(index, I64(4)))
        results = []
        for n, (integers, total) in enumerate(zip(held, totals, strict=True)):
            line = builder.add(weight, builder.mul(self.line, I64(4 * n)))
            factor = vectors.splat(builder, load(builder, line, F32), HALVES)
            results.append(vectors.fused(builder, builder.sitofp(integers, HALVES), factor, total))
        return results

    def _step(self, source: Any, numbers: list[Any], at: Any, held: list[Any]) -> list[Any]:
        """Sums with the products of one more span of codes with every vector."""
        builder, held = self.builder, list(held)
        place = builder.lshr(builder.mul(at, I64(self.bits)), I64(3))
        codes = unpack_fields(builder, builder.add(source, place), self.bits, self.span)
        for field, code in enumerate(codes):
            offset = builder.add(builder.mul(at, I64(2)), I64(2 * LANES * field))
            for n in range(self.count):
                values = load(builder, builder.add(numbers[n], offset), WORDS)
                held[n] = builder.add(held[n], _pair_products(builder, code, values))
        return held


@intrinsic
def row(
    typing: Any,
    codes: Any,
    x: Any,
    stride: Any,
    weights: Any,
    starts: Any,
    line: Any,
    chunks: Any,
    chunk: Any,
    out: Any,
    key: Any,
) -> Any:
    """Products of a row of codes with n integer vectors, `stride` numbers apart.

    Writes ``starts + sum over chunks of weights * (codes * x)`` to `out` [n]. `weights` are [n, chunks],
    each `line` numbers long, `starts` [n, 8] to be summed up; `key` is a `version`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def emit(case: int) -> None:
            bits, fields, unrolled, count = case // 64, bool(case & 32), case // UNROLLED_STEP % 4, case % 8
            chunk = UNROLLED[unrolled - 1] if unrolled else 0
            _Version(builder, arguments, bits, fields, count, chunk).emit()

        vectors.switch(builder, arguments[-1], _versions(), emit)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 10), generate
