"""Batches that wait in front of the layers that are still to be solved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kvpack.calibrate import staged
from kvpack.calibrate.staged import Repeated, Staged, Waiting, find_stages, fits, held_bytes
from kvpack.core.errors import SourceError
from kvpack.core.types import Stat
from tests.calibrate.conftest import Job

GRAM = frozenset({Stat("gram")})
NAMES = ("a", "b", "last")
PARTS = [slice(0, 2), slice(2, 4), slice(4, 5)]
WAYS = pytest.mark.parametrize("way", [Waiting, Repeated])


class Block(nn.Module):
    """Two layers with one input, and one behind them; counts how often that was passed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.passed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.a(x) * self.b(x))
        self.passed += 1
        return y + x


class Course:
    """A block of which every stage is doubled once it was measured, and what was seen on the way."""

    def __init__(self, way: type[Staged], through: Callable | None = None) -> None:
        self.block, self.grams = Block(), {}
        self.x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))
        self.modules = {name: self.block.get_submodule(name) for name in NAMES}
        through = through or (lambda part: self.block(self.x[part]))
        stages = [("a", "b"), ("last",)]
        self.flow = way(stages, self.modules, dict.fromkeys(NAMES, GRAM), self._double, through)

    def _double(self, stage, inputs) -> None:
        for name in stage:
            self.grams[name] = inputs.of(name)["gram"]
            self.modules[name].weight.data *= 2

    def hooks(self) -> int:
        return sum(len(module._forward_pre_hooks) for module in self.modules.values())

    @torch.no_grad()
    def run(self) -> tuple[bool, list[torch.Tensor]]:
        with self.flow.attached(PARTS):
            whole = self.flow.run()
            return whole, [result for _, result in self.flow.results()] if whole else []


@torch.no_grad()
@WAYS
def test_every_stage_is_measured_behind_solved_ones(way) -> None:
    course = Course(way)
    assert course.run()[0]
    x = course.x.reshape(-1, 8)
    product = course.block.a(x) * course.block.b(x)  # both doubled by now
    assert torch.allclose(course.grams["a"]["gram"], x.T @ x, rtol=1e-5)
    assert course.grams["b"]["gram"] is course.grams["a"]["gram"]
    assert torch.allclose(course.grams["last"]["gram"], product.T @ product, rtol=1e-5)
    assert int(course.grams["last"]["count"]) == 15
    assert course.hooks() == 0


@torch.no_grad()
def test_waiting_batches_pass_a_block_once_and_leave_it_packed() -> None:
    course = Course(Waiting)
    _, results = course.run()
    assert course.block.passed == len(PARTS)
    assert torch.equal(torch.cat(results), torch.cat([course.block(course.x[part]) for part in PARTS]))


def test_both_ways_measure_the_same_bits() -> None:
    one, other = Course(Waiting), Course(Repeated)
    one.run()
    other.run()
    for name in NAMES:
        assert torch.equal(one.grams[name]["gram"], other.grams[name]["gram"]), name


@WAYS
def test_a_batch_that_goes_another_way_ends_the_flow(way) -> None:
    def through(part: slice) -> torch.Tensor:
        x = course.x[part]
        y = course.block.b(course.block.a(x)) if part == PARTS[1] else course.block.a(x) * course.block.b(x)
        return course.block.last(y)

    course = Course(way, through)
    assert course.run() == (False, [])
    assert (course.flow.solved, course.hooks()) == (1, 0)


@WAYS
def test_a_batch_that_leaves_a_stage_out_ends_the_flow(way) -> None:
    course = Course(way, lambda part: course.block.a(course.x[part]))
    assert course.run() == (False, [])
    assert (course.flow.solved, course.hooks()) == (1, 0)


@WAYS
@pytest.mark.parametrize("error", [KeyboardInterrupt, SourceError("broken")])
def test_an_error_in_one_batch_unwinds_all(way, error) -> None:
    inside = []

    def through(part: slice) -> torch.Tensor:
        inside.append(part)
        try:
            x = course.x[part]
            y = course.block.a(x) * course.block.b(x)
            if part == PARTS[1]:
                raise error
            return course.block.last(y)
        finally:
            inside.remove(part)

    course = Course(way, through)
    with pytest.raises(error if isinstance(error, type) else SourceError):
        course.run()
    assert (inside, course.hooks()) == ([], 0)


@WAYS
def test_an_error_between_stages_unwinds_all(way) -> None:
    course = Course(way)
    course.flow._solve = lambda stage, inputs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        course.run()
    assert (course.block.passed, course.hooks()) == (0, 0)


@torch.no_grad()
def test_stages_end_where_batches_may_part() -> None:
    net, x = Block(), torch.ones(2, 8)
    modules = {name: net.get_submodule(name) for name in NAMES}
    assert find_stages(modules, lambda: net(x)) == [("a", "b"), ("last",)]
    assert find_stages(modules, lambda: net(x), ("la",)) == [("a", "b")]
    assert find_stages(modules, lambda: net.last(net(x))) == [("a", "b")]
    assert find_stages(modules, lambda: net.b(net.a(x))) == [("a",), ("b",)]
    assert find_stages(modules, lambda: None) == []
    assert sum(len(m._forward_pre_hooks) for m in modules.values()) == 0


def test_what_waiting_takes(job: Job, monkeypatch) -> None:
    at = job.plan.model.attention[0]  # 4 heads of 16, 2 of them for keys and values
    assert held_bytes(6, 48, 64, 500, at, eager=False) == 4 * 6 * 48 * (4 * 64 + 500)
    assert held_bytes(6, 48, 64, 8, at, eager=True) == 4 * 6 * 48 * (4 * 64 + (8 + 4) * 16 + 4 * 48)
    for available, limit in ((100, 50), (None, staged.UNKNOWN // 2)):
        monkeypatch.setattr(staged, "available_bytes", lambda found=available: found)
        assert fits(limit)
        assert not fits(limit + 1)
