"""The kernels that `gpu_kernels.py` checks and times, at which shapes, and beside what."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.gpu_timing import Bench, Call, Row
from kvpack.ops.packed_affine import AffineCodes, dense


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
