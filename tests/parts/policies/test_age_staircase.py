"""The staircase's schedule against the listing's closed form (SAQ, arXiv 2410.18441)."""

import pytest

from kvpack.core.errors import RecipeError
from kvpack.parts.policies.age_staircase import AgeStaircase


@pytest.mark.parametrize("rungs", [("a",), ("a", "b"), ("a", "b", "c")])
def test_block_i_from_the_newest_lies_on_rung_min_of_i_and_the_last(rungs: tuple[str, ...]) -> None:
    policy = AgeStaircase(stair_tokens=16, rungs=rungs)
    for blocks in range(8):
        expected = [0] * len(rungs)
        for i in range(blocks):
            expected[min(i, len(rungs) - 1)] += 16
        assert policy.placement(16 * blocks, 8, "key") == tuple(expected)


def test_stairs_are_whole_token_blocks() -> None:
    policy = AgeStaircase(stair_tokens=10)
    assert policy.leaving(35, 8, "key") == 32
    assert policy.leaving(35, 1, "value") == 30


def test_a_staircase_without_rungs_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least one rung"):
        AgeStaircase(rungs=())
