"""k-means of vectors: k-means++ seeding, Lloyd's steps in chunks, no empty clusters.

Everything is float32 and drawn from a seeded generator. Distances are never held for more than
`CHUNK_ELEMENTS` pairs of a point and a centre.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
MOST_STEPS = 300
WEIGHTED_STEPS = 25
MOST_POINTS = 256
"""Points per centre that weighted k-means looks at."""
TOLERANCE = 1e-4
"""Lloyd's steps end when one lowers the mean squared distance by no more than this share of it, or
when no point changes its centre."""


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
    before, own = torch.inf, None
    for _ in range(steps):
        places, distances = assign(points, centres)
        cost = float(distances.double().mean())
        if before - cost <= TOLERANCE * cost or (own is not None and torch.equal(places, own)):
            break
        before, own = cost, places
        centres = _means(points, places, distances, centres)
    return centres


def fit_weighted(points: Tensor, heavy: Tensor, channels: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Centres that make a weighted sum of squared distances small; the metric differs from place to place.

    What is minimised is ``sum_pn heavy_pn sum_d channels_pd (x_pnd - c_d)^2`` over the nearest centre
    of every point. Seeding does not weigh. Of more than `MOST_POINTS` points per centre, so many are
    drawn.

    Args:
        points: [P, N, D], N points at each of P places.
        heavy: weight of the points [P, N], not negative.
        channels: weight of the channels at a place [P, D], positive.
        count: how many centres.
        seed: of the draws.

    Returns:
        float32 [count, D].
    """
    generator = torch.Generator().manual_seed(seed)
    kept = max(1, count * MOST_POINTS // len(points))
    if kept < points.shape[1]:
        drawn = torch.randperm(points.shape[1], generator=generator)[:kept].to(points.device)
        points, heavy = points[:, drawn], heavy[:, drawn]
    root, flat = channels.sqrt().unsqueeze(1), points.flatten(0, 1)
    shares = (heavy.unsqueeze(-1) * channels.unsqueeze(1)).flatten(0, 1)
    stretched, own = points * root, None
    centres, before = _seeded(flat, count, generator), torch.inf
    for _ in range(WEIGHTED_STEPS):
        places, distances = assign(stretched, centres * root)
        errors = (distances * heavy).flatten()
        cost = float(errors.double().mean())
        if before - cost <= TOLERANCE * cost or (own is not None and torch.equal(places, own)):
            break
        before, own = cost, places
        centres = _weighted_means(flat, shares, places.flatten(), errors, centres)
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


def _weighted_means(
    points: Tensor, shares: Tensor, places: Tensor, errors: Tensor, centres: Tensor
) -> Tensor:
    """Move every centre to the weighted mean of its points, those without weight to the worst points."""
    weights = torch.zeros_like(centres).index_add_(0, places, shares)
    sums = torch.zeros_like(centres).index_add_(0, places, points * shares)
    moved = torch.where(weights > 0, sums / torch.where(weights > 0, weights, 1.0), centres)
    empty = (weights == 0).all(-1).nonzero().squeeze(-1)[: len(points)]
    if len(empty):
        moved[empty] = points[errors.topk(len(empty)).indices]
    return moved


def _means(points: Tensor, places: Tensor, distances: Tensor, centres: Tensor) -> Tensor:
    """Move every centre to the mean of its points, empty ones to the farthest points."""
    counts = torch.bincount(places, minlength=len(centres))
    sums = torch.zeros_like(centres).index_add_(0, places, points)
    moved = sums / counts.clamp(min=1).unsqueeze(-1)
    empty = (counts == 0).nonzero().squeeze(-1)[: len(points)]
    if len(empty):
        moved[empty] = points[distances.topk(len(empty)).indices]
    return moved
