"""What is measured of a block's layers, and when a batch may end early."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvpack.calibrate.collect import InputStats
from kvpack.core.types import Stat

GRAM = frozenset({Stat("gram")})


class Block(nn.Module):
    """Two layers with the same input, one behind them; `runs` counts what came after the last one's input."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.twice, self.runs = twice, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) * self.b(x)
        out = self.last(y)
        out = self.last(out) if self.twice else out
        self.runs += 1
        return out


def measure(block: Block, *, stop: bool) -> InputStats:
    names = ("a", "b", "last")
    inputs = InputStats(dict.fromkeys(names, GRAM))
    inputs.stop = stop
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            with inputs.attached({name: block.get_submodule(name) for name in names}):
                block(torch.randn(2, 5, 8, generator=generator))
    return inputs


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def test_batches_end_once_every_layer_was_seen(block: Block) -> None:
    whole = measure(block, stop=False)
    assert block.runs == 3
    early = measure(block, stop=True)
    assert block.runs == 4, "the first batch runs to its end, the other two do not"
    for name in ("a", "b", "last"):
        assert torch.equal(whole.of(name)["gram"]["gram"], early.of(name)["gram"]["gram"])
        assert int(early.of(name)["gram"]["count"]) == 30


def test_batches_in_which_a_layer_is_called_twice_run_to_their_end() -> None:
    torch.manual_seed(0)
    block = Block(twice=True)
    measure(block, stop=True)
    assert block.runs == 3


def test_a_layer_that_the_first_batch_leaves_out_is_waited_for() -> None:
    torch.manual_seed(0)
    block, inputs = Block(), InputStats({"a": GRAM, "last": GRAM})
    inputs.stop = True
    with torch.no_grad():
        for first in (True, False):
            with inputs.attached({"a": block.a, "last": block.last}):
                block.a(torch.ones(1, 8))
                if not first:
                    block.last(torch.ones(1, 8))
                    block.runs += 1
    assert block.runs == 1
    assert int(inputs.of("last")["gram"]["count"]) == 1


def test_layers_with_the_same_input_share_one_finished_statistic(block: Block) -> None:
    inputs = measure(block, stop=True)
    assert inputs.leader("b") == "a"
    first = inputs.of("a")["gram"]["gram"]
    assert inputs.of("b")["gram"]["gram"] is first
    assert inputs.of("last")["gram"]["gram"] is not first
    assert torch.equal(inputs.of("a")["gram"]["gram"], first)
