"""Heads side by side, and how gradients pass KVQuant's chain of key transforms."""

import pytest
import torch

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Site
from kvpack.parts.transforms.merge_heads import MergeHeads
from kvpack.parts.transforms.unrope import Unrope
from tests.contracts.discovery import random
from tests.contracts.test_transforms import site

MERGE = MergeHeads()


def test_channels_of_a_head_stay_together() -> None:
    x = random(2, 3, 5, 4)
    z = MERGE.forward(x, {}, Site(0))
    assert z.shape == MERGE.shape((2, 3, 5, 4)) == (2, 1, 5, 12)
    for head in range(3):
        assert torch.equal(z[:, 0, :, 4 * head : 4 * head + 4], x[:, head])


def test_inverse_needs_the_number_of_heads() -> None:
    z = MERGE.forward(random(1, 3, 5, 4), {}, Site(0))
    for heads in (0, 5):
        with pytest.raises(KvpackError, match="cannot come from"):
            MERGE.inverse(z, {}, Site(0, kv_heads=heads))


def test_there_is_no_query_side() -> None:
    assert MERGE.dual(random(1, 3, 5, 4), {}, Site(0)) is None
    with pytest.raises(RecipeError, match="no query side"):
        MERGE.query(random(1, 3, 5, 4), {}, Site(0))


def test_gradients_follow_the_chain_rule() -> None:
    """d loss / d z, where the loss is a function of the keys that the inverse gives back."""
    keys, target = random(2, 3, 6, 16), random(2, 3, 6, 16, seed=1)
    at, chain = site(3, 6), (Unrope(), MERGE)
    z = keys
    for transform in chain:
        z = transform.forward(z, {}, at)
    z = z.requires_grad_()
    back = z
    for transform in reversed(chain):
        back = transform.inverse(back, {}, at)
    (back - target).square().sum().backward()
    gradient = 2 * (keys - target)
    for transform in chain:
        gradient = transform.gradient(gradient, {}, at)
    assert torch.allclose(gradient, z.grad, atol=1e-4)
