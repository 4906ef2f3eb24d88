"""KIVI's windows, and sinks that survive padding and chunks."""

import pytest
import torch

from kvpack.core.types import CacheView
from kvpack.parts.policies.sink_recent import SinkRecent


def held(policy: SinkRecent, chunks: list[int], block: int) -> int:
    tail = 0
    for tokens in chunks:
        tail += tokens
        tail -= policy.leaving(tail, block, "key")
    return tail


@pytest.mark.parametrize("prompt", [1, 31, 32, 127, 128, 129, 300])
@pytest.mark.parametrize("steps", [0, 1, 100])
def test_window_sizes_are_kivis(prompt: int, steps: int) -> None:
    chunks, total = [prompt, *[1] * steps], prompt + steps
    assert held(SinkRecent(recent_tokens=128), chunks, 32) == total % 128
    assert held(SinkRecent(recent_tokens=128), chunks, 1) == min(128, total)
    assert held(SinkRecent(recent_tokens=0), chunks, 32) == total % 32
    assert held(SinkRecent(recent_tokens=0), chunks, 1) == 0


def test_window_is_rounded_up_to_whole_blocks() -> None:
    policy = SinkRecent(recent_tokens=40)
    assert policy.leaving(63, 32, "key") == 0
    assert policy.leaving(64, 32, "key") == 64


def sinks(policy: SinkRecent, seen: list[int], valid: torch.Tensor | None, tokens: int) -> list[list[int]]:
    found = policy.protect(CacheView(0, len(seen), tokens, torch.tensor(seen), valid))
    return [] if found is None else [row.nonzero().flatten().tolist() for row in found]


def test_sinks_are_the_first_real_tokens() -> None:
    valid = torch.tensor([[True] * 6, [False] * 3 + [True] * 3])
    assert sinks(SinkRecent(sink_tokens=2), [0, 0], valid, 6) == [[0, 1], [3, 4]]
    assert sinks(SinkRecent(sink_tokens=2), [0, 0], None, 1) == [[0], [0]]


def test_sinks_continue_over_chunks() -> None:
    policy = SinkRecent(sink_tokens=4)
    assert sinks(policy, [3, 0], None, 3) == [[0], [0, 1, 2]]
    assert sinks(policy, [4, 9], None, 3) == []
    assert SinkRecent(sink_tokens=0).protect(CacheView(0, 1, 3, torch.tensor([0]))) is None
