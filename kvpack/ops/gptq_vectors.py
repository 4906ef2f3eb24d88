"""GPTQ for codes that stand for d neighbouring columns at once, and codebooks fitted to outputs.

Source: GPTVQ, arXiv 2402.15319, algorithm 1, with all codebooks made beforehand. With U as in
`kvpack.ops.gptq` and U_pp its d x d block at the columns of vector p, what is lost when these columns
change by e is |e U_pp^-1|^2 once all later columns have answered with -(e U_pp^-1) U_p,later. So the
vector next to w in the metric of U_pp^-1 is chosen, and the errors are passed on d columns at a time.
For d = 1 this is GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack.ops import kmeans_vectors


def solve(
    weight: Tensor, scale: Tensor, books: Tensor, upper: Tensor, per_book: int, *, block: int = 128
) -> Tensor:
    """Choose codes vector by vector, and let later columns absorb the errors.

    Args:
        weight: float32 [R, C].
        scale: of every vector, float32 [R, P] where P = C / d.
        books: codebooks float32 [B, K, d].
        upper: `kvpack.ops.gptq.inverse_factor` of the Gram matrix [C, C].
        per_book: vectors of a row that share a codebook.
        block: columns whose corrections to the rest are applied together.

    Returns:
        int64 [R, P].
    """
    size, vectors = books.shape[-1], scale.shape[1]
    # Columns become rows: each step reads d contiguous rows.
    work, upper = weight.T.contiguous(), upper.to(weight.dtype)
    codes = torch.empty(scale.shape, dtype=torch.int64, device=weight.device)
    step = max(1, block // size)
    for first in range(0, vectors, step):
        last = min(first + step, vectors)
        start, stop = first * size, last * size
        errors = torch.empty_like(work[start:stop])
        for p in range(first, last):
            a, b = p * size, (p + 1) * size
            metric = torch.linalg.inv(upper[a:b, a:b])
            book, own = books[p // per_book], scale[:, p : p + 1]
            wanted = work[a:b].T / torch.where(own == 0, 1.0, own)
            codes[:, p] = kmeans_vectors.assign(wanted @ metric, book @ metric)[0]
            error = ((work[a:b].T - own * book[codes[:, p]]) @ metric).T
            work[b:stop] -= upper[a:b, b:stop].T @ error
            errors[a - start : b - start] = error
        work[stop:] -= upper[start:stop, stop:].T @ errors
    return codes


def fit_books(
    weight: Tensor, scale: Tensor, importance: Tensor, count: int, size: int, per_book: int, *, seed: int = 0
) -> Tensor:
    """First codebooks: k-means of the vectors, every channel weighed by its importance.

    Args:
        weight: float32 [R, C].
        scale: of every vector, float32 [R, P]; rows count with its square.
        importance: of the channels, the diagonal of the Gram matrix [C]; positive.
        count: vectors of a codebook.
        size: channels of a vector.
        per_book: vectors of a row that share a codebook.
        seed: of the draws.

    Returns:
        float32 [B, count, size].
    """
    whole = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    vectors = (torch.unflatten(weight, 1, (-1, size)) / whole).transpose(0, 1)
    channels = torch.unflatten(importance, 0, (-1, size))
    found = []
    for first in range(0, len(vectors), per_book):
        part = slice(first, first + per_book)
        heavy = scale[:, part].square().T
        found.append(kmeans_vectors.fit_weighted(vectors[part], heavy, channels[part], count, seed=seed))
    return torch.stack(found)


def refit(
    weight: Tensor, scale: Tensor, codes: Tensor, books: Tensor, gram: Tensor, per_book: int, *, steps: int
) -> Tensor:
    """Codebooks that make the output error small for codes that are given, by conjugate gradients.

    ``trace((W - Q) G (W - Q)^T)`` is quadratic in the books, so every step lowers it.

    Args:
        weight: float32 [R, C].
        scale: of every vector [R, P].
        codes: int64 [R, P].
        books: where to start, float32 [B, K, d].
        gram: G [C, C], damped.
        per_book: vectors of a row that share a codebook.
        steps: how many.

    Returns:
        float32 [B, K, d].
    """
    own = torch.arange(codes.shape[1], device=codes.device) // per_book
    places = (codes + own * books.shape[1]).flatten()
    wide, found = scale.repeat_interleave(books.shape[2], 1), books.flatten(0, 1)

    def pull(rows: Tensor) -> Tensor:
        """Half the negative gradient when the weight is off by `rows` [R, C]."""
        force = ((rows @ gram) * wide).reshape(-1, books.shape[2])
        return torch.zeros_like(found).index_add_(0, places, force)

    def rows_of(vectors: Tensor) -> Tensor:
        return vectors[places].reshape(weight.shape) * wide

    residual = pull(weight - rows_of(found))
    direction, square = residual, float(residual.square().sum())
    for _ in range(steps):
        curved = pull(rows_of(direction))
        bend = float((direction * curved).sum())
        if bend <= 0 or square <= 0:
            break
        found = found + square / bend * direction
        residual = residual - square / bend * curved
        before, square = square, float(residual.square().sum())
        direction = residual + square / before * direction
    return found.reshape(books.shape)
