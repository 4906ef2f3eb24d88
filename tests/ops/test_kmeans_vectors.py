"""k-means of vectors."""

import pytest
import torch

from kvpack.ops import kmeans_vectors
from tests.contracts.discovery import random


@pytest.mark.parametrize(("points", "count", "channels"), [(1, 1, 3), (50, 4, 1), (300, 16, 8), (40, 64, 2)])
def test_places_are_the_nearest_centres(points: int, count: int, channels: int) -> None:
    x, centres = random(points, channels), random(count, channels, seed=1)
    places, distances = kmeans_vectors.assign(x, centres)
    table = (x.double()[:, None] - centres.double()).square().sum(-1)
    assert torch.equal(places, table.argmin(-1))
    assert torch.allclose(distances.double(), table.amin(-1), atol=1e-4)


def test_chunks_and_leading_axes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, centres = random(2, 3, 50, 4), random(2, 3, 8, 4, seed=1)
    whole = kmeans_vectors.assign(x, centres)[0]
    monkeypatch.setattr(kmeans_vectors, "CHUNK_ELEMENTS", 64)
    assert torch.equal(kmeans_vectors.assign(x, centres)[0], whole)
    assert torch.equal(kmeans_vectors.assign(x[1, 2], centres[1, 2])[0], whole[1, 2])


def test_separate_clusters_are_found_and_each_centre_is_a_mean() -> None:
    middles = 100 * random(16, 5)
    x = (middles.repeat(30, 1) + random(480, 5, seed=1)).contiguous()
    centres = kmeans_vectors.fit(x, 16)
    places, distances = kmeans_vectors.assign(x, centres)
    assert torch.bincount(places, minlength=16).tolist() == [30] * 16
    assert distances.mean() < 6
    means = torch.stack([x[places == i].mean(0) for i in range(16)])
    assert torch.allclose(means, centres, atol=1e-3)


def test_the_cost_falls_and_equal_seeds_give_equal_bits() -> None:
    x = random(600, 6)
    costs = [kmeans_vectors.assign(x, kmeans_vectors.fit(x, 20, steps=n))[1].mean() for n in (0, 1, 5, 300)]
    assert costs == sorted(costs, reverse=True)
    assert torch.equal(kmeans_vectors.fit(x, 20), kmeans_vectors.fit(x, 20))
    assert not torch.equal(kmeans_vectors.fit(x, 20), kmeans_vectors.fit(x, 20, seed=1))


@pytest.mark.parametrize("count", [1, 4, 9])
def test_fewer_different_points_than_centres(count: int) -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 5.0]])
    centres = kmeans_vectors.fit(x, count)
    assert centres.shape == (count, 2)
    assert centres.isfinite().all()
    if count >= 2:
        assert kmeans_vectors.assign(x, centres)[1].max() < 1e-6


def test_an_empty_cluster_moves_to_the_farthest_point() -> None:
    x = torch.tensor([[0.0], [0.1], [9.0]])
    centres = torch.tensor([[0.0], [100.0]])
    places, distances = kmeans_vectors.assign(x, centres)
    assert kmeans_vectors._means(x, places, distances, centres)[1].item() == 9.0
