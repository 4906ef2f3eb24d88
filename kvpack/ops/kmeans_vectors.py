"""k-means of vectors: k-means++ seeding, Lloyd's steps in chunks, no empty clusters.

Everything is float32 and drawn from a seeded generator. Distances are never held for more than
`CHUNK_ELEMENTS` pairs of a point and a centre.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
MOST_STEPS = 300
TOLERANCE = 1e-4
"""Lloyd's steps end when one lowers the mean squared distance by no more than this share of it."""


def fit(points: Tensor, count: int, *, seed: int = 0, steps: int = MOST_STEPS) -> Tensor:
    """Centres that make the sum of squared distances small.

    Seeding by squared distance (Arthur and Vassilvitskii, "k-means++: the advantages of careful
    seeding", 2007), then Lloyd's steps. A centre that loses all its points moves to the point that
    is the farthest from its own centre.

    Args:
        points: [N, D], finite.
        count: how many centres.
        seed: of the draws.
        steps: at most so many Lloyd's steps.

    Returns:
        float32 [count, D]. Centres repeat where there are fewer different points.
    """
    points = points.float()
    centres = _seeded(points, count, torch.Generator().manual_seed(seed))
    before = torch.inf
    for _ in range(steps):
        places, distances = assign(points, centres)
        cost = float(distances.double().mean())
        if before - cost <= TOLERANCE * cost:
            break
        before = cost
        centres = _means(points, places, distances, centres)
    return centres


def assign(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest of `centres` [..., C, D] for every point [..., N, D]; the leading axes are the same.

    ||x - c||^2 = ||x||^2 - 2 x.c + ||c||^2, where ||x||^2 changes no place. Ties go to the first.

    Returns:
        Places int64 [..., N] and squared distances [..., N].
    """
    half = centres.square().sum(-1).unsqueeze(-2) / 2
    step = max(1, CHUNK_ELEMENTS // max(1, half.numel()))
    places = torch.empty(points.shape[:-1], dtype=torch.int64, device=points.device)
    least = points.new_empty(points.shape[:-1])
    for start in range(0, points.shape[-2], step):
        part = slice(start, start + step)
        found = torch.sub(half, points[..., part, :] @ centres.mT).min(-1)
        places[..., part], least[..., part] = found.indices, found.values
    return places, (points.square().sum(-1) + 2 * least).clamp(min=0)


def _seeded(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a point drawn with its squared distance to those before."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    squares = points.square().sum(-1)
    chosen = [min(int(draws[0] * len(points)), len(points) - 1)]
    nearest = torch.full_like(squares, torch.inf)
    for draw in draws[1:]:
        latest = points[chosen[-1]]
        distance = torch.addmv(squares, points, latest, alpha=-2.0) + squares[chosen[-1]]
        nearest = torch.minimum(nearest, distance.clamp(min=0))
        nearest[chosen[-1]] = 0
        mass = nearest.cumsum(0, dtype=torch.float64)
        place = int(torch.searchsorted(mass, mass.new_tensor([draw * float(mass[-1])]), right=True))
        chosen.append(min(place, len(points) - 1))
    return points[chosen].clone()


def _means(points: Tensor, places: Tensor, distances: Tensor, centres: Tensor) -> Tensor:
    """Move every centre to the mean of its points, empty ones to the farthest points."""
    counts = torch.bincount(places, minlength=len(centres))
    sums = torch.zeros_like(centres).index_add_(0, places, points)
    moved = sums / counts.clamp(min=1).unsqueeze(-1)
    empty = (counts == 0).nonzero().squeeze(-1)[: len(points)]
    if len(empty):
        moved[empty] = points[distances.topk(len(empty)).indices]
    return moved
