"""Extreme entries against sorting."""

import numpy as np
import pytest
import torch

from kvpack.ops import outlier_counts, outliers
from tests.contracts.discovery import random


@pytest.mark.parametrize(
    ("keep", "length", "expected"),
    [
        (0.01, 4096, (21, 21)),  # the official cap
        (0.01, 1024, (6, 6)),
        (0.01, 8, (1, 1)),
        (0.02, 1000, (10, 10)),
        (0.07, 200, (7, 7)),  # 0.07 / 2 * 200 is 7.000000000000001 in floats
        (0.0, 64, (0, 0)),
        (1.0, 7, (3, 4)),
        (1.0, 8, (4, 4)),
        (0.5, 1, (0, 1)),
        (0.5, 2, (1, 1)),
    ],
)
def test_counts(keep: float, length: int, expected: tuple[int, int]) -> None:
    assert outlier_counts.sides(keep, length) == expected


@pytest.mark.parametrize(
    ("length", "dtype"), [(256, "uint8"), (257, "int16"), (32768, "int16"), (32769, "int32")]
)
def test_places_are_as_narrow_as_the_length_allows(length: int, dtype: str) -> None:
    assert outlier_counts.index_dtype(length) == dtype
    assert torch.tensor(length - 1).to(getattr(torch, dtype)).long() == length - 1


@pytest.mark.parametrize("dim", [-1, -2])
def test_both_ends_are_those_of_sorting(dim: int) -> None:
    x = random(2, 3, 40, 50)
    places = outliers.both_ends(x, 3, 5, dim)
    ordered = x.sort(dim).values
    expected = torch.cat((ordered.narrow(dim, 0, 3), ordered.narrow(dim, x.shape[dim] - 5, 5)), dim)
    assert torch.equal(x.gather(dim, places).sort(dim).values, expected)


def test_ties_take_no_place_twice() -> None:
    for x in (torch.zeros(4, 10), torch.tensor([[1.0, 1.0, 2.0, 2.0]])):
        places = outliers.both_ends(x, x.shape[1] // 2, x.shape[1] // 2, -1)
        assert torch.equal(places.sort(-1).values, torch.arange(x.shape[1]).expand_as(x))


def test_what_does_not_count_comes_last() -> None:
    x = torch.tensor([[9.0, -9.0, 1.0, 2.0, 3.0]])
    valid = torch.tensor([[False, False, True, True, True]])
    assert set(outliers.both_ends(x, 1, 1, -1, valid)[0].tolist()) == {2, 4}
    taken = outliers.both_ends(x, 2, 2, -1, valid)[0].tolist()
    assert {2, 3, 4} < set(taken)
    assert len(set(taken)) == 4


def test_farthest_in_units_of_the_range() -> None:
    lower, upper = torch.tensor([[-1.0, -10.0, 3.0]]), torch.tensor([[1.0, 10.0, 3.0]])
    x = torch.tensor([[2.0, 11.0, 3.0], [0.0, 11.0, 3.001]])
    assert outliers.farthest(x, lower, upper, 1).tolist() == [[0], [2]]
    assert outliers.farthest(x, lower, upper, 3)[1].tolist() == [2, 1, 0]


@pytest.mark.parametrize("fill", ["median", "mean"])
@pytest.mark.parametrize("dim", [-1, -2])
def test_the_fill_is_that_of_the_others(fill: str, dim: int) -> None:
    x = random(5, 9, 11).double()
    places = outliers.both_ends(x.float(), 2, 2, dim)
    found = outliers.replaced(x, places, dim, fill)
    moved, spots, seen = (t.movedim(dim, -1).numpy() for t in (x, places, found))
    for index in np.ndindex(moved.shape[:-1]):
        rest = np.sort(np.delete(moved[index], spots[index]))
        middle = rest.mean() if fill == "mean" else rest[(len(rest) - 1) // 2]
        assert np.allclose(seen[index][spots[index]], middle)
        assert np.array_equal(np.sort(np.delete(seen[index], spots[index])), rest)


def test_nothing_left_is_filled_with_zero() -> None:
    x = random(2, 4)
    assert torch.equal(outliers.replaced(x, torch.arange(4).expand(2, 4), -1, "median"), torch.zeros(2, 4))


@pytest.mark.parametrize("keep", [1.0, 0.99, 0.9, 0.5])
@pytest.mark.parametrize("count", [1, 2, 40, 1000])
def test_central_range(keep: float, count: int) -> None:
    x = random(3, count, 4)
    lower, upper = outliers.central_range(x, keep, 1)
    out = min(int(round((1 - keep) / 2 * count, 6)), (count - 1) // 2)
    ordered = x.sort(1).values
    assert torch.equal(lower, ordered[:, out])
    assert torch.equal(upper, ordered[:, count - 1 - out])
