"""Products with affine codes that are never decoded as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvpack.kernels import choice
from kvpack.ops import packed_affine
from kvpack.ops.packed_affine import AffineCodes


def scores(query: Tensor, x: AffineCodes) -> Tensor:
    """See `kvpack.ops.packed_affine.scores`."""
    if _cpu(query, x):
        from kvpack.kernels.cpu import affine

        return affine.scores(query, x)
    if x.outer == 1 and choice.on_gpu(query, x.codes, x.scale, x.zero):
        return _gpu_products(query, x)
    return packed_affine.scores(query, x)


def multiplier(x: AffineCodes) -> Callable[[Tensor], Tensor]:
    """`scores` in the dtype of the query, for codes that are multiplied again and again.

    What does not depend on the query is found once. The codes must stay where they are in memory.
    """
    if _cpu(x.codes, x):
        from kvpack.kernels.cpu import affine

        return affine.multiplier(x)
    return lambda query: scores(query, x).to(query.dtype)


def integer_products(x: AffineCodes, weight: AffineCodes) -> Tensor | None:
    """Products x W^T of coded rows [..., N, C] with a coded weight [R, C], summed as integers.

    float32 [N, R]; None where no kernel does that: it takes symmetric 8-bit codes, the rows with one
    step each.
    """
    plain = x.bits == 8 and x.zero is None and x.axis == "channel" and x.scale.shape[-1] == 1
    if not plain or not choice.on_gpu(x.codes, x.scale, weight.codes, weight.scale, weight.zero):
        return None
    from kvpack.kernels.triton import int8_matmul

    if not int8_matmul.fits(weight):
        return None
    # A code is its number plus 128.
    numbers = x.codes.reshape(-1, x.channels).bitwise_xor(128).view(torch.int8)
    return int8_matmul.int8_matmul(numbers, x.scale.reshape(-1), weight, torch.float32)


def mix(weights: Tensor, x: AffineCodes) -> Tensor:
    """See `kvpack.ops.packed_affine.mix`."""
    if _cpu(weights, x):
        from kvpack.kernels.cpu import affine

        return affine.mix(weights, x)
    return packed_affine.mix(weights, x)


def dense(x: AffineCodes, dtype: torch.dtype) -> Tensor:
    """See `kvpack.ops.packed_affine.dense`."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16) and _cpu(x.codes, x):
        from kvpack.kernels.cpu import affine

        return affine.dense(x, dtype)
    return packed_affine.dense(x, dtype)


def attention(
    query: Tensor,
    keys: AffineCodes,
    values: AffineCodes,
    start: int,
    tokens: int,
    mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Unnormalised attention over `tokens` coded tokens from `start` on, in one kernel; None without one.

    Args:
        query: [B, K, M, D], scaled already.
        keys: [B, K, T, D].
        values: [B, K, T, D].
        start: the first of the tokens.
        tokens: how many there are.
        mask: is added to scores, float32 [B, tokens] or None.
        softcap: bounds scores, or None.

    Returns:
        Weighted values float32 [B, K, M, D], maxima and sums of weights [B, K, M].
    """
    if softcap is None and keys.channels == values.channels and _cpu(query, keys) and _cpu(query, values):
        from kvpack.kernels.cpu import affine

        return affine.attention(query, keys, values, start, tokens, mask)
    if not choice.on_gpu(query, keys.codes, keys.scale, keys.zero, values.codes, values.scale, values.zero):
        return None
    from kvpack.kernels.triton import affine_attention, attention_plan

    if not attention_plan.fits(keys, values, query.shape[2]):
        return None
    cap = 0.0 if softcap is None else softcap
    return affine_attention.affine_attention(
        query, keys, values, start=start, tokens=tokens, mask=mask, scale=1.0, softcap=cap
    )


def _gpu_products(query: Tensor, x: AffineCodes) -> Tensor:
    from kvpack.kernels.triton import affine_matmul

    weight = x._replace(
        codes=x.codes.flatten(0, -2),
        scale=x.scale.flatten(0, -2),
        zero=None if x.zero is None else x.zero.flatten(0, -2),
    )
    if not affine_matmul.fits(weight):
        return packed_affine.scores(query, x)
    rows = query.reshape(-1, x.channels)
    return affine_matmul.affine_matmul(rows, weight).float().reshape(*query.shape[:-1], x.tokens)


def _cpu(source: Tensor, x: AffineCodes) -> bool:
    if not choice.on_cpu(source, x.codes, x.scale, x.zero):
        return False
    from kvpack.kernels.cpu import affine

    return affine.fits(x)
