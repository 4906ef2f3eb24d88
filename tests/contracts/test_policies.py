"""What every tier policy promises."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvpack.core.roles import TierPolicy
from kvpack.core.types import CacheView
from tests.contracts.discovery import parts, random

POLICIES = parts("policies")
PLANES = ["key", "value"]


def view(policy: TierPolicy, lengths: list[int], tokens: int, seed: int = 0) -> CacheView:
    """A left-padded prompt; row b ends with `lengths[b]` tokens that are not padding."""
    valid = torch.stack([torch.arange(tokens) >= tokens - n for n in lengths])
    hidden = random(len(lengths), tokens, 16, seed=seed) if policy.needs_hidden else None
    seen = torch.zeros(len(lengths), dtype=torch.long)
    return CacheView(0, len(lengths), tokens, seen, valid, hidden)


def protected(policy: TierPolicy, given: CacheView) -> Tensor:
    found = policy.protect(given)
    if found is None:
        return torch.zeros(given.batch, given.tokens, dtype=torch.bool)
    assert found.dtype == torch.bool
    assert found.shape == (given.batch, given.tokens)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("block", [1, 4, 32])
def test_whole_blocks_leave_once(policy: TierPolicy, plane: str, block: int) -> None:
    for tail in range(300):
        leaving = policy.leaving(tail, block, plane)
        assert 0 <= leaving <= tail
        assert leaving % block == 0
        assert policy.leaving(tail - leaving, block, plane) == 0, "nothing more leaves without new tokens"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("block", [1, 4, 32])
@pytest.mark.parametrize("chunks", [[300], [1] * 300, [7, 200, 1, 1, 90, 1], [128, 128, 44]])
def test_chunks_encode_what_one_prompt_encodes(
    policy: TierPolicy, plane: str, block: int, chunks: list[int]
) -> None:
    encoded = tail = 0
    for tokens in chunks:
        tail += tokens
        leaving = policy.leaving(tail, block, plane)
        encoded, tail = encoded + leaving, tail - leaving
    assert encoded == policy.leaving(300, block, plane)


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_is_never_protected(policy: TierPolicy) -> None:
    given = view(policy, [40, 3, 1, 0], 40)
    found = protected(policy, given)
    assert not (found & ~given.valid).any()
    assert (found.sum(1) <= policy.protected_tokens()).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_and_neighbours_change_nothing(policy: TierPolicy) -> None:
    given = view(policy, [40, 30, 3], 40)
    found = protected(policy, given)
    for row, length in enumerate([40, 30, 3]):
        hidden = given.hidden[row : row + 1, -length:] if given.hidden is not None else None
        alone = CacheView(0, 1, length, given.seen[:1], None, hidden)
        if length > 1:
            assert torch.equal(protected(policy, alone)[0], found[row, -length:])


@pytest.mark.parametrize("policy", POLICIES)
def test_none_stands_for_no_tokens(policy: TierPolicy) -> None:
    late = replace(view(policy, [1], 1), seen=torch.tensor([10_000]))
    assert policy.protect(late) is None, "a lone late token costs no bookkeeping"


@pytest.mark.parametrize("policy", POLICIES)
def test_tiers_differ(policy: TierPolicy) -> None:
    names = (policy.inside, *policy.coded)
    assert all(names)
    assert len(policy.coded) > 0
    assert len(set(names)) == len(names)
