"""Queries that look at every key from one distance."""

import pytest
import torch

from kvpack.core.errors import KvpackError
from kvpack.core.types import Site
from kvpack.parts.transforms.rope_window import RopeWindow
from tests.contracts.discovery import random
from tests.contracts.test_transforms import HalfRope


def site(*positions: int) -> Site:
    return Site(0, HalfRope(), torch.tensor([positions]), 2)


@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("distance", [0, 64, 2048, 100_000])
def test_scores_are_those_of_keys_at_the_distance(channels: int, distance: int) -> None:
    rope, part = HalfRope(), RopeWindow(position=distance)
    q, k = random(1, 2, 3, channels), random(1, 2, 3, channels, seed=1)
    queries, keys = torch.tensor([[700, 3, 9000]]), torch.tensor([[12, 0, 8]])
    turned = part.query(rope.apply(q, queries), {}, site(700, 3, 9000))
    stored = part.forward(rope.apply(k, keys), {}, site(12, 0, 8))
    far = rope.apply(q.double(), torch.full_like(keys, 5 + distance))
    near = rope.apply(k.double(), torch.full_like(keys, 5))
    expected = far.double() @ near.double().mT
    assert torch.allclose((turned @ stored.mT).double(), expected, atol=2e-2 if distance > 9999 else 5e-3)


def test_half_precision_queries_are_turned_in_float32() -> None:
    q = random(1, 2, 1, 64).bfloat16()
    found = RopeWindow().query(q, {}, site(4))
    assert found.dtype == torch.float32
    assert torch.equal(found, RopeWindow().query(q.float(), {}, site(4)))


def test_it_has_no_exact_query_side() -> None:
    assert RopeWindow().dual(random(1, 2, 1, 8), {}, site(0)) is None


def test_a_model_without_rope_is_refused() -> None:
    with pytest.raises(KvpackError, match="rope_window got no rotary embedding"):
        RopeWindow().forward(random(1, 2, 1, 8), {}, Site(3))
