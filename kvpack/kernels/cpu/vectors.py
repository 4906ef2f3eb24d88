"""Vector code over float32 numbers in memory: products and sums of rows of 16 numbers and more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu.codes import LANES, constant, load
from kvpack.kernels.cpu.jit import ADDRESS, F32, I32, I64, device, read_float

FLOATS = ir.VectorType(F32, LANES)


@functools.cache
def has_avx2() -> bool:
    """Whether this processor has the instructions of x86 that some loops are written for."""
    from llvmlite import binding

    return bool(dict(binding.get_host_cpu_features()).get("avx2"))


def call(builder: Any, name: str, result: Any, arguments: Sequence[Any], flags: Sequence[str] = ()) -> Any:
    """Call one of LLVM's own functions."""
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = ir.Function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=flags)


def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address, which need not exist."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), I32, I32, I32])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [builder.inttoptr(address, kind.args[0]), I32(0), I32(3), I32(1)])


def splat(builder: Any, number: Any, kind: Any = FLOATS) -> Any:
    """A vector of one number."""
    empty = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(empty, number, I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))


def every(kind: Any, number: float) -> Any:
    """A vector constant of one number."""
    return constant(kind, [number] * kind.count)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once where the processor can."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, [a, b, c])


def total(builder: Any, vector: Any) -> Any:
    """The sum of a vector's numbers, in any order."""
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    return call(builder, name, F32, [F32(0.0), vector], ("reassoc",))


def store(builder: Any, value: Any, address: Any) -> None:
    """Write a value to an address of float32 numbers."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


WIDTHS = range(1, 9)
"""Widths of a code."""


@intrinsic
def dot(typing: Any, a: Any, b: Any, count: Any) -> Any:
    """The product of two rows of `count` float32 numbers, a multiple of 16, at addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, count = arguments
        (result,) = _dots(builder, a, [b], count)
        return total(builder, result)

    return types.float32(ADDRESS, ADDRESS, types.int64), generate


@intrinsic
def two_by_four_dots(
    typing: Any, rows: Any, apart: Any, others: Any, stride: Any, count: Any, out: Any, step: Any
) -> Any:
    """Products of two rows, `apart` bytes apart, with four others, `stride` bytes apart.

    Those of one other row are neighbours; `step` bytes lie between others. `count` is a multiple of 8.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, apart, others, stride, count, out, step = arguments
        eight = ir.VectorType(F32, 8)
        lines = [builder.add(others, builder.mul(stride, I64(n))) for n in range(4)]

        def one(at: Any, sums: list[Any]) -> list[Any]:
            place = builder.mul(at, I64(4))
            pair = [load(builder, builder.add(row, place), eight) for row in (rows, builder.add(rows, apart))]
            numbers = [load(builder, builder.add(line, place), eight) for line in lines]
            products = [(x, y) for y in numbers for x in pair]
            return [fused(builder, x, y, held) for (x, y), held in zip(products, sums, strict=True)]

        found = loop(builder, count, 8, [ir.Constant(eight, [0.0] * 8)] * 8, one)
        # Neighbours are added until every product has one number left: a tree for all eight together.
        while len(found) > 1:
            found = [_pairwise(builder, *pair) for pair in zip(found[::2], found[1::2], strict=True)]
        two = ir.VectorType(F32, 2)
        for n in range(4):
            places = ir.Constant(ir.VectorType(I32, 2), [2 * n, 2 * n + 1])
            part = builder.shuffle_vector(found[0], ir.Constant(eight, ir.Undefined), places)
            address = builder.add(out, builder.mul(step, I64(n)))
            builder.store(part, builder.inttoptr(address, two.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 7), generate


def _dots(builder: Any, row: Any, others: Sequence[Any], count: Any) -> list[Any]:
    """Products of a row with others, as vectors of sixteen partial sums."""

    def step(at: Any, sums: list[Any]) -> list[Any]:
        place = builder.mul(at, I64(4))
        shared = load(builder, builder.add(row, place), FLOATS)
        numbers = [load(builder, builder.add(other, place), FLOATS) for other in others]
        return [fused(builder, shared, x, held) for x, held in zip(numbers, sums, strict=True)]

    return loop(builder, count, LANES, [every(FLOATS, 0.0)] * len(others), step)


def _pairwise(builder: Any, a: Any, b: Any | None) -> Any:
    """Sums of neighbours: those of `a`, then those of `b`."""
    count = a.type.count if b is None else 2 * a.type.count
    other = ir.Constant(a.type, ir.Undefined) if b is None else b
    places = ir.VectorType(I32, count // 2)
    even, odd = (ir.Constant(places, list(range(first, count, 2))) for first in (0, 1))
    return builder.fadd(builder.shuffle_vector(a, other, even), builder.shuffle_vector(a, other, odd))


@intrinsic
def peak_and_sum(typing: Any, row: Any, count: Any, out: Any) -> Any:
    """Write the largest magnitude and the sum of `count` numbers, a multiple of 16, to `out`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, count, out = arguments

        def step(at: Any, held: list[Any]) -> list[Any]:
            numbers = load(builder, builder.add(row, builder.mul(at, I64(4))), FLOATS)
            size = call(builder, f"llvm.fabs.v{LANES}f32", FLOATS, [numbers])
            larger = builder.select(builder.fcmp_ordered(">", size, held[0]), size, held[0])
            return [larger, builder.fadd(held[1], numbers)]

        nothing = every(FLOATS, 0.0)
        peaks, sums = loop(builder, count, LANES, [nothing, nothing], step)
        peak = call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", F32, [peaks])
        store(builder, peak, out)
        store(builder, total(builder, sums), builder.add(out, I64(4)))
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64, ADDRESS), generate


@device
def product(a: Any, b: Any, count: Any) -> Any:
    """The product of two rows of any length."""
    whole = count // LANES * LANES
    result = np.float32(0)
    if whole:
        result = dot(a, b, whole)
    for j in range(whole, count):
        result += read_float(a + 4 * j) * read_float(b + 4 * j)
    return result


@intrinsic
def add_rows(typing: Any, out: Any, rows: Any, stride: Any, weights: Any, count: Any) -> Any:
    """Add ``weights[i] * rows[i]`` for `count` rows, 16 numbers of each, to the 16 numbers at `out`.

    Rows lie `stride` bytes apart.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, rows, stride, weights, count = arguments
        _add(builder, [out], rows, stride, [weights], count)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), generate


@intrinsic
def add_rows_to_four(
    typing: Any, out: Any, out_stride: Any, rows: Any, stride: Any, weights: Any, step: Any, count: Any
) -> Any:
    """`add_rows` for four outputs, `out_stride` bytes apart, with weights `step` bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, out_stride, rows, stride, weights, step, count = arguments
        outs = [builder.add(out, builder.mul(out_stride, I64(n))) for n in range(4)]
        lines = [builder.add(weights, builder.mul(step, I64(n))) for n in range(4)]
        _add(builder, outs, rows, stride, lines, count)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 7), generate


def _add(
    builder: Any, outs: Sequence[Any], rows: Any, stride: Any, weights: Sequence[Any], count: Any
) -> None:
    """Add weighted rows to every output; a row is read once for all of them."""

    def step(at: Any, sums: list[Any]) -> list[Any]:
        row, place = (
            load(builder, builder.add(rows, builder.mul(at, stride)), FLOATS),
            builder.mul(at, I64(4)),
        )
        factors = [splat(builder, load(builder, builder.add(line, place), F32)) for line in weights]
        return [fused(builder, factor, row, held) for factor, held in zip(factors, sums, strict=True)]

    sums = loop(builder, count, 1, [load(builder, out, FLOATS) for out in outs], step)
    for value, out in zip(sums, outs, strict=True):
        store(builder, value, out)


def switch(builder: Any, key: Any, cases: Iterable[int], emit: Callable[[int], None]) -> None:
    """Emit the code of every case, each in a branch of its own; any other key does nothing."""
    done = builder.append_basic_block("done")
    choice = builder.switch(key, done)
    for case in cases:
        block = builder.append_basic_block(f"case{case}")
        choice.add_case(I64(case), block)
        builder.position_at_end(block)
        emit(case)
        builder.branch(done)
    builder.position_at_end(done)


def loop(builder: Any, count: Any, step: int, start: list[Any], body: Any) -> list[Any]:
    """Run ``values = body(at, values)`` for at = 0, `step`, ... below `count`, at least once."""
    before = builder.block
    inside, after = (builder.append_basic_block(name) for name in ("rows", "done"))
    builder.branch(inside)
    builder.position_at_end(inside)
    at = builder.phi(I64)
    values = [builder.phi(value.type) for value in start]
    at.add_incoming(I64(0), before)
    for value, first in zip(values, start, strict=True):
        value.add_incoming(first, before)
    results: list[Any] = body(at, list(values))
    following, last = builder.add(at, I64(step)), builder.block
    at.add_incoming(following, last)
    for value, result in zip(values, results, strict=True):
        value.add_incoming(result, last)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    return results
