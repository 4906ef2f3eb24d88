"""Vector code around the products of `integer_rows`: rounded vectors, and what the grid of a row adds."""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvpack.kernels.cpu import jit, vectors
from kvpack.kernels.cpu.affine_rows import CENTRED, CENTRED_INTEGER, OFFSET
from kvpack.kernels.cpu.codes import LANES, constant, load
from kvpack.kernels.cpu.frames import GROUPS
from kvpack.kernels.cpu.jit import ADDRESS, F32, I8, I16, I32, I64
from kvpack.kernels.cpu.stored_floats import SIZES, widened

EIGHT = ir.VectorType(F32, GROUPS)
FIELDS = (1, 2, 4, 8)
"""Codes in a word: vectors are rounded in the order in which words give their codes."""


def _switch(builder: Any, chosen: Any, cases: dict[int, Any], kind: Any) -> Any:
    """The value of the case that is chosen; cases emit code and return a value of a kind."""
    done, start = builder.append_basic_block("chosen"), builder.block
    blocks = {case: builder.append_basic_block("case") for case in cases}
    builder.position_at_end(start)
    switch = builder.switch(chosen, next(iter(blocks.values())))
    found = []
    for case, block in blocks.items():
        switch.add_case(I64(case), block)
        builder.position_at_end(block)
        found.append((cases[case](), builder.block))
        builder.branch(done)
    builder.position_at_end(done)
    result = builder.phi(kind)
    for value, block in found:
        result.add_incoming(value, block)
    return result


def _eight(builder: Any, address: Any, first: Any, kind: Any) -> Any:
    """Eight stored numbers, the first of which is number `first` at an address, as float32."""

    def read(stored: int) -> Any:
        place = builder.add(address, builder.mul(first, I64(SIZES[stored])))
        return widened(builder, stored, place, GROUPS)

    kinds = (jit.FLOAT16, jit.BFLOAT16, jit.FLOAT32, jit.FLOAT8)
    return _switch(builder, kind, {stored: partial(read, stored) for stored in kinds}, EIGHT)


@intrinsic
def weigh(
    typing: Any,
    scale: Any,
    scale_kind: Any,
    zero: Any,
    zero_kind: Any,
    zeros: Any,
    half: Any,
    groups: Any,
    count: Any,
    factors: Any,
    chunks: Any,
    sums: Any,
    steps: Any,
    weights: Any,
    starts: Any,
) -> Any:
    """What the grid of a row says for n = `count` vectors: weights of chunks, and the part without codes.

    Writes the steps as float32 to `steps`; steps times `factors` [n, chunks] to `weights`
    [n, chunks + 8], which is right where a group is a chunk; and to `starts` [n, 8] the sums over
    groups of what code 0 stands for times `sums` [n, groups], to be added up. `groups` is a multiple
    of 8; all of them are read.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _weigh(builder, arguments)
        return context.get_dummy_value()

    kinds = [ADDRESS, types.int64, ADDRESS, types.int64, types.int64, types.float32, types.int64]
    return types.void(*kinds, *[ADDRESS] * 7), generate


def _weigh(builder: Any, arguments: Any) -> None:
    """`weigh`: eight groups at a time, whose grid is read once for all vectors."""
    scale, scale_kind, zero, zero_kind, zeros, half, groups, count = arguments[:8]
    factors, chunks, sums, steps, weights, starts = arguments[8:]
    line = builder.add(chunks, I64(GROUPS))

    def begin(n: Any, values: list[Any]) -> list[Any]:
        vectors.store(builder, constant(EIGHT, [0.0] * GROUPS), _start(builder, starts, n))
        return values

    def step(first: Any, values: list[Any]) -> list[Any]:
        numbers = _eight(builder, scale, first, scale_kind)
        vectors.store(builder, numbers, builder.add(steps, builder.mul(first, I64(4))))
        low = _low(builder, numbers, zero, first, zero_kind, zeros, half)

        def one(n: Any, inner: list[Any]) -> list[Any]:
            def place(base: Any, width: Any) -> Any:
                index = builder.add(builder.mul(n, width), first)
                return builder.add(base, builder.mul(index, I64(4)))

            own, out, share = place(factors, chunks), place(weights, line), place(sums, groups)
            _weigh_eight(builder, numbers, low, own, out, share, _start(builder, starts, n))
            return inner

        return vectors.loop(builder, count, 1, values, one)

    vectors.loop(builder, count, 1, [], begin)
    vectors.loop(builder, groups, GROUPS, [], step)


def _start(builder: Any, starts: Any, n: Any) -> Any:
    """Where the eight numbers of vector `n` are."""
    return builder.add(starts, builder.mul(n, I64(4 * GROUPS)))


def _weigh_eight(
    builder: Any, steps: Any, low: Any, factors: Any, weights: Any, sums: Any, start: Any
) -> None:
    """`weigh` for eight groups and one vector; addresses of what belongs to them."""
    vectors.store(builder, builder.fmul(steps, load(builder, factors, EIGHT)), weights)
    total = vectors.fused(builder, low, load(builder, sums, EIGHT), load(builder, start, EIGHT))
    vectors.store(builder, total, start)


def _low(builder: Any, steps: Any, zero: Any, first: Any, zero_kind: Any, zeros: Any, half: Any) -> Any:
    """What code 0 stands for in eight groups."""
    middle = vectors.splat(builder, half, EIGHT)

    def integer() -> Any:
        stored = load(builder, builder.add(zero, first), ir.VectorType(I8, GROUPS))
        numbers = builder.sitofp(builder.sext(stored, ir.VectorType(I32, GROUPS)), EIGHT)
        return builder.fneg(builder.fmul(steps, builder.fadd(numbers, middle)))

    cases = {
        CENTRED: lambda: builder.fneg(builder.fmul(steps, middle)),
        OFFSET: lambda: _eight(builder, zero, first, zero_kind),
        CENTRED_INTEGER: integer,
    }
    return _switch(builder, zeros, cases, EIGHT)


@intrinsic
def round_chunk(typing: Any, source: Any, chunk: Any, inverse: Any, fields: Any, out: Any, rest: Any) -> Any:
    """Write the nearest integers of a chunk times `inverse` as 16-bit words, in the order of the codes.

    Where `rest` is not 0, the 32767-fold of what was rounded off goes there in the same way.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, chunk, inverse, fields, out, rest = arguments
        done = builder.append_basic_block("rounded")
        switch = builder.switch(fields, done)
        for count in FIELDS:
            block = builder.append_basic_block(f"fields{count}")
            switch.add_case(I64(count), block)
            builder.position_at_end(block)
            _round(builder, source, chunk, inverse, count, out, rest)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64, types.float32, types.int64, ADDRESS, ADDRESS), generate


def _round(builder: Any, source: Any, chunk: Any, inverse: Any, fields: int, out: Any, rest: Any) -> None:
    """`round_chunk` for words of `fields` codes."""
    wide = ir.VectorType(F32, fields * LANES)
    scale, again = vectors.splat(builder, inverse, wide), vectors.splat(builder, F32(32767.0), wide)

    def step(first: Any, values: list[Any]) -> list[Any]:
        numbers = load(builder, builder.add(source, builder.mul(first, I64(4))), wide)
        exact = builder.fmul(numbers, scale)
        whole = vectors.call(builder, f"llvm.rint.v{wide.count}f32", wide, [exact])
        place = builder.mul(first, I64(2))
        _write_words(builder, whole, fields, builder.add(out, place))
        with builder.if_then(builder.icmp_signed("!=", rest, I64(0))):
            left = builder.fmul(builder.fsub(exact, whole), again)
            left = vectors.call(builder, f"llvm.rint.v{wide.count}f32", wide, [left])
            _write_words(builder, left, fields, builder.add(rest, place))
        return values

    vectors.loop(builder, chunk, wide.count, [], step)


def _write_words(builder: Any, whole: Any, fields: int, out: Any) -> None:
    """Write whole numbers as words: first all that come first in their word of codes, and so on."""
    count = fields * LANES
    words = builder.trunc(builder.fptosi(whole, ir.VectorType(I32, count)), ir.VectorType(I16, count))
    for field in range(fields):
        places = ir.Constant(ir.VectorType(I32, LANES), list(range(field, count, fields)))
        part = builder.shuffle_vector(words, words, places)
        address = builder.add(out, I64(2 * LANES * field))
        builder.store(part, builder.inttoptr(address, part.type.as_pointer())).align = 2
