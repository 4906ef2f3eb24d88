"""Products that read chosen rows only, beside the whole products."""

from __future__ import annotations

import pytest
import torch

from kvpack.ops.skipping import PIECE_BYTES, chosen_rows, weighted_rows
from tests.contracts.discovery import random

CASES = [(0, 96), (1, 96), (37, 96), (96, 96)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "rows"), CASES)
@pytest.mark.parametrize("channels", [48, 80, 172])
def test_both_products(count: int, rows: int, channels: int, dtype: torch.dtype) -> None:
    weight, x = random(rows, channels).to(dtype), random(channels, seed=1).to(dtype)
    chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(2))[:count].sort().values
    factors = random(count, seed=3).to(dtype)
    found, summed = chosen_rows(weight, chosen, x), weighted_rows(weight, chosen, factors)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    assert torch.allclose(found.double(), weight[chosen].double() @ x.double(), **tolerance)
    assert torch.allclose(summed.double(), factors.double() @ weight[chosen].double(), **tolerance)
    assert found.dtype == summed.dtype == dtype


def test_rows_of_more_than_a_piece() -> None:
    channels = 1024
    weight = random(PIECE_BYTES // (4 * channels) * 2 + 7, channels)
    chosen, x = torch.arange(len(weight)), random(channels, seed=1)
    assert torch.allclose(chosen_rows(weight, chosen, x), weight @ x, atol=1e-3)


def test_rows_that_are_columns_of_a_transposed_matrix() -> None:
    stored = random(80, 48).t().contiguous().t()
    chosen, factors = torch.tensor([3, 17, 40]), random(3)
    found = weighted_rows(stored.t(), chosen, factors)
    assert torch.allclose(found, stored[:, chosen] @ factors, atol=1e-5)
