"""Vector code that unpacks rows of b-bit codes: one LLVM sequence for every width.

Sixteen codes fill 2b bytes. Each code lies in two neighbouring bytes, as bits s to s + b of a
16-bit word with s < 8: a byte shuffle brings the two bytes into a lane of their own, a
multiplication by 2^(16-b-s) moves the code to the top of the lane, a shift brings it down. Where b
divides 16, whole words are loaded instead and each is shifted and masked 16/b times, which gives
the codes in another order (`unpack_fields`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from kvpack.kernels.cpu.frames import LANES as LANES
from kvpack.kernels.cpu.jit import I8, I16, I32

WORDS = ir.VectorType(I16, LANES)


def constant(kind: Any, values: Sequence[float]) -> Any:
    """A vector constant."""
    return ir.Constant(kind, list(values))


def load(builder: Any, address: Any, kind: Any) -> Any:
    """Read a value of any alignment."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def unpack_fields(builder: Any, address: Any, bits: int, span: int) -> list[Any]:
    """The `span` codes at an address as vectors of 16 words.

    Lane l of vector k holds code ``l * fields + k``, where a word holds `fields` codes.
    """
    if span == LANES:
        return [unpack_words(builder, address, bits)]
    word, fields = load(builder, address, WORDS), span // LANES
    mask = constant(WORDS, [(1 << bits) - 1] * LANES)
    shifted = [builder.lshr(word, constant(WORDS, [bits * k] * LANES)) if k else word for k in range(fields)]
    return [builder.and_(v, mask) for v in shifted[:-1]] + shifted[-1:]


def unpack_words(builder: Any, address: Any, bits: int) -> Any:
    """Sixteen codes in order, from exactly 2 * `bits` bytes."""
    size = 2 * bits
    raw = load(builder, address, ir.VectorType(I8, size))
    places = []
    for lane in range(LANES):
        first = lane * bits // 8
        places += [first, first + 1 if first + 1 < size else size]  # `size` is a byte of zeros
    nothing = constant(ir.VectorType(I8, size), [0] * size)
    pairs = builder.shuffle_vector(raw, nothing, constant(ir.VectorType(I32, 2 * LANES), places))
    shifts = [1 << (16 - bits - lane * bits % 8) for lane in range(LANES)]
    top = builder.mul(builder.bitcast(pairs, WORDS), constant(WORDS, shifts))
    return builder.lshr(top, constant(WORDS, [16 - bits] * LANES))
