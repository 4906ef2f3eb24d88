"""The sweep over vectors against its textbook form, and codebooks against their normal equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpack.ops import gptq, gptq_vectors, kmeans_vectors
from tests.contracts.discovery import random

DAMP = 0.01


def problem(rows: int = 12, channels: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its damped Gram matrix and the factor of its inverse, in float64."""
    x = (random(300, channels) @ random(channels, channels, seed=1)).double()
    gram = x.T @ x
    upper = gptq.inverse_factor(gram, DAMP)
    assert upper is not None
    return random(rows, channels, seed=2), gram + DAMP * gram.diagonal().mean() * torch.eye(channels), upper


def swept(weight: Tensor, scale: Tensor, books: Tensor, gram: Tensor, per_book: int) -> tuple[Tensor, float]:
    """Codes by the optimal-brain-surgeon answer, inverted afresh at every step; and what was lost."""
    size, work, codes, lost = books.shape[-1], weight.double().clone(), [], 0.0
    for p in range(scale.shape[1]):
        start = p * size
        inverse = torch.linalg.inv(gram[start:, start:])
        metric = torch.linalg.inv(inverse[:size, :size])
        values = scale[:, p, None, None].double() * books[p // per_book].double()
        errors = work[:, None, start : start + size] - values
        costs = torch.einsum("rki,ij,rkj->rk", errors, metric, errors)
        chosen = costs.argmin(1)
        lost += float(costs.amin(1).sum())
        codes.append(chosen)
        error = errors[torch.arange(len(work)), chosen]
        work[:, start + size :] -= error @ metric @ inverse[:size, size:]
        work[:, start : start + size] -= error
    return torch.stack(codes, 1), lost


@pytest.mark.parametrize(("size", "per_book"), [(1, 40), (2, 20), (4, 3), (8, 2)])
@pytest.mark.parametrize("block", [1, 12, 128])
def test_it_is_the_optimal_answer_vector_by_vector(size: int, per_book: int, block: int) -> None:
    weight, gram, upper = problem()
    books = random(-(-40 // size // per_book), 16, size, seed=3)
    scale = random(12, 40 // size, seed=4).abs() + 0.5
    codes = gptq_vectors.solve(weight, scale, books, upper, per_book, block=block)
    expected, lost = swept(weight, scale, books, gram, per_book)
    assert torch.equal(codes, expected)
    own = torch.arange(40 // size) // per_book
    error = weight - (books[own, codes] * scale[..., None]).reshape(weight.shape)
    total = torch.einsum("ri,ij,rj->", error.double(), gram, error.double())
    assert float(total) == pytest.approx(lost, rel=1e-4), "what was lost adds up to the output error"


def test_single_columns_are_gptq() -> None:
    weight, _, upper = problem()
    levels = torch.linspace(-2, 2, 16)
    codes = gptq_vectors.solve(weight, torch.ones_like(weight), levels[None, :, None], upper, 40)

    def nearest(column: Tensor, grid: dict[str, Tensor]) -> Tensor:
        return (column[..., None] - levels).abs().argmin(-1).to(torch.uint8)

    plain = gptq.solve(
        weight, upper, 40, lambda x: {"none": x[:, :1]}, nearest, lambda c, grid: levels[c.long()]
    )[0]
    assert torch.equal(codes, plain.long())


def test_refitted_books_solve_the_normal_equations() -> None:
    weight, gram, upper = problem(rows=30, channels=24)
    books, scale = random(2, 4, 2, seed=3), random(30, 12, seed=4).abs() + 0.5
    codes = gptq_vectors.solve(weight, scale, books, upper, 6)
    root = torch.linalg.cholesky(gram)
    places = codes + torch.arange(12) // 6 * 4
    design = torch.zeros(30, 24, 16, dtype=torch.float64)  # row, channel, entry of the books
    for p in range(12):
        for i in range(2):
            design[torch.arange(30), 2 * p + i, 2 * places[:, p] + i] = scale[:, p].double()
    wanted = torch.linalg.lstsq((root.T @ design).flatten(0, 1), (weight.double() @ root).flatten())
    found = gptq_vectors.refit(weight, scale, codes, books, gram.float(), 6, steps=60)
    assert torch.allclose(found.flatten().double(), wanted.solution, atol=1e-3)

    def error(table: Tensor) -> float:
        off = weight.double() - design @ table.flatten().double()
        return float(torch.einsum("ri,ij,rj->", off, gram, off))

    errors = [
        error(gptq_vectors.refit(weight, scale, codes, books, gram.float(), 6, steps=n)) for n in range(4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(gptq_vectors.refit(weight, scale, codes, books, gram.float(), 6, steps=0), books)


def test_weighted_centres_are_weighted_means() -> None:
    points, heavy = random(3, 200, 4), random(3, 200, seed=1).square()
    channels = random(3, 4, seed=2).square() + 0.1
    heavy[:, :50] = 0
    points[:, :50] += 100  # nobody asks for these
    centres = kmeans_vectors.fit_weighted(points, heavy, channels, 8)
    for _ in range(200):  # on to the fixed point from which the tolerance has stopped
        table = ((points[:, :, None] - centres).square() * channels[:, None, None]).sum(-1).argmin(-1)
        shares = (heavy[..., None] * channels[:, None]).flatten(0, 1)
        one = torch.nn.functional.one_hot(table.flatten(), 8).float()
        means = (one.T @ (shares * points.flatten(0, 1))) / (one.T @ shares).clamp(min=1e-20)
        used = (one * heavy.reshape(-1, 1)).sum(0) > 0
        moved = torch.where(used[:, None], means, centres)
        if torch.allclose(moved, centres, atol=1e-5):
            break
        centres = moved

    def cost(table: Tensor) -> float:
        return float(
            ((points[:, :, None] - table).square() * channels[:, None, None])
            .sum(-1)
            .amin(-1)
            .mul(heavy)
            .sum()
        )

    found = kmeans_vectors.fit_weighted(points, heavy, channels, 8)
    assert cost(found) <= 1.1 * cost(centres)
    assert cost(found) < cost(kmeans_vectors.fit(points[:, 50:].flatten(0, 1), 8))
    assert torch.equal(found, kmeans_vectors.fit_weighted(points, heavy, channels, 8))


def test_weights_may_be_nothing() -> None:
    found = kmeans_vectors.fit_weighted(random(2, 5, 3), torch.zeros(2, 5), torch.ones(2, 3), 16)
    assert found.isfinite().all()
