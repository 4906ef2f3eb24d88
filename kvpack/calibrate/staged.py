"""One forward of a block in which every layer is packed before anything passes it.

GPTQ's "true sequential" calibration (the reference implementation of arXiv 2210.17323): a layer is
measured behind the packed layers before it. Layers that are given one tensor are a stage. Every
batch runs up to a stage and waits in front of it; when all stand there, its statistics are complete,
its layers are solved and replaced, and the batches go on. At its end a batch has passed the packed
block, so one forward does what otherwise takes one per stage and another for the outputs.

A waiting batch is a greenlet: a stack of its own in the same thread, so that torch's modes and its
team of threads stay as they are. It holds what the block has in hand, `held_bytes`. Where that is
too much for the machine, every stage is reached by another forward instead, which stops there. Both
compute the same numbers in the same order: results do not tell which of them it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

from greenlet import greenlet

from kvpack.calibrate.collect import InputStats
from kvpack.core.model_spec import AttentionSpec
from kvpack.core.resident import available_bytes
from kvpack.core.types import Stat

if TYPE_CHECKING:
    from torch import Tensor, nn

Stage = tuple[str, ...]
Modules = Mapping[str, "nn.Module"]
Through = Callable[[slice], "Tensor"]

SHARE = 0.5
"""Part of the available memory that waiting batches may take; Gram matrices and solvers need some, too."""
UNKNOWN = 4 << 30
"""Bytes that are taken to be available on systems that do not tell."""


def held_bytes(
    samples: int, tokens: int, channels: int, widest: int, at: AttentionSpec, *, eager: bool
) -> int:
    """What batches hold at most while they wait, all together, in float32.

    Args:
        samples: how many there are.
        tokens: of one sample.
        channels: of the residual stream, of which about four copies are held: as it entered the block,
            as it is now, normed, and what modules have not let go of (measured on Llama).
        widest: channels of the widest input of a stage.
        at: the block's attention; at its output projection, queries, keys and values are still held.
        eager: whether attention weights are, too.
    """
    inside = (2 * at.heads + 2 * at.kv_heads) * at.head_dim + (at.heads * tokens if eager else 0)
    return 4 * samples * tokens * (4 * channels + max(widest, inside))


def fits(needed: int) -> bool:
    """Whether batches that hold `needed` bytes may wait on this machine."""
    available = available_bytes()
    return needed <= SHARE * (UNKNOWN if available is None else available)


def find_stages(modules: Modules, run: Callable[[], None], loose: tuple[str, ...] = ()) -> list[Stage]:
    """The stages of a block, in the order in which a batch comes to them.

    They end before the first layer that is called twice, or whose path begins with one of `loose`:
    such layers may be called otherwise by another batch.

    Args:
        modules: the layers to measure, by path.
        run: runs something through the block.
        loose: beginnings of paths.
    """
    calls: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda m, args, n=name: calls.append((n, args[0])))
            stack.callback(hook.remove)
        run()
    count = Counter(name for name, _ in calls)
    stages: list[tuple[str, ...]] = []
    given: Tensor | None = None
    for name, x in takewhile(lambda c: count[c[0]] == 1 and not c[0].startswith(loose), calls):
        if x is given:
            stages[-1] += (name,)
        else:
            stages.append((name,))
        given = x
    return stages


class _Irregular(Exception):
    """A batch calls the layers in another order than the trial did."""


class _Reached(Exception):
    """A batch came to the stage that is measured."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class Staged(ABC):
    """Takes all batches through a block, stage by stage.

    Args:
        stages: from `find_stages`.
        modules: their layers, by path.
        wanted: statistics of their inputs.
        solve: replaces the weights of a stage, given its statistics.
        through: runs a batch through the block, up to what it gives.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        modules: Modules,
        wanted: Mapping[str, frozenset[Stat]],
        solve: Callable[[Stage, InputStats], None],
        through: Through,
    ) -> None:
        self.stages, self.modules, self.wanted = stages, modules, wanted
        self.solved = 0
        self._solve, self._through = solve, through
        self._order = [name for stage in stages for name in stage]
        self._first = {stage[0]: number for number, stage in enumerate(stages)}
        self._called = 0
        self._given: Tensor | None = None

    @contextmanager
    def attached(self, parts: Sequence[slice]) -> Iterator[None]:
        """Watch the layers while the batches `parts` run; in the end none waits, whatever happened."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                hook = module.register_forward_pre_hook(lambda m, args, n=name: self._see(n, args[0]))
                stack.callback(hook.remove)
            stack.callback(self._close)
            self._open(parts)
            yield

    def run(self) -> bool:
        """Solve every stage; False when a batch went another way: stages from `solved` on are left."""
        try:
            for stage in self.stages:
                inputs = InputStats({name: self.wanted[name] for name in stage})
                for x in self._arrivals():
                    inputs.add(stage, x)
                self._solve(stage, inputs)
                self.solved += 1
        except _Irregular:
            return False
        return True

    def results(self) -> Iterator[tuple[slice, Tensor]]:
        """What the block makes of every batch, in order, when all stages are solved; empty if none waits."""
        return iter(())

    def _start(self, part: slice) -> Tensor:
        self._called = 0
        return self._through(part)

    def _see(self, name: str, x: Tensor) -> None:
        """A batch calls a layer. All have come equally far, so one count of calls serves them."""
        if self.solved == len(self.stages):
            return
        called = self._called
        if name not in self._order[called : called + 1] or not (name in self._first or x is self._given):
            raise _Irregular
        if self._first.get(name) == self.solved:
            self._stop(x)
        self._called, self._given = called + 1, x

    @abstractmethod
    def _open(self, parts: Sequence[slice]) -> None:
        """Get the batches ready."""

    @abstractmethod
    def _arrivals(self) -> Iterator[Tensor]:
        """Bring every batch to the next stage, in order; what that is given."""

    @abstractmethod
    def _stop(self, x: Tensor) -> None:
        """The running batch is in front of the next stage, which is given `x`."""

    def _close(self) -> None:
        """Let go of what the batches hold."""
        self._given = None


class Waiting(Staged):
    """Every batch has a stack of its own, and goes on where it waited."""

    def results(self) -> Iterator[tuple[slice, Tensor]]:
        """Let every batch go on to the end of the block."""
        for part, batch in self._batches:
            yield part, batch.switch()

    def _open(self, parts: Sequence[slice]) -> None:
        self._batches = [(part, greenlet(partial(self._start, part))) for part in parts]
        for _, batch in self._batches:
            batch.gr_context = copy_context()

    def _arrivals(self) -> Iterator[Tensor]:
        for _, batch in self._batches:
            x = batch.switch()
            if batch.dead:
                raise _Irregular
            yield x

    def _stop(self, x: Tensor) -> None:
        greenlet.getcurrent().parent.switch(x)

    def _close(self) -> None:
        super()._close()
        for _, batch in self._batches:
            if not batch.dead:
                batch.throw()


class Repeated(Staged):
    """Every batch starts again for every stage, and ends there; what the block gives takes another pass."""

    def _open(self, parts: Sequence[slice]) -> None:
        self._parts = parts

    def _arrivals(self) -> Iterator[Tensor]:
        for part in self._parts:
            yield self._reached(part)

    def _reached(self, part: slice) -> Tensor:
        try:
            self._start(part)
        except _Reached as found:
            return found.x
        raise _Irregular

    def _stop(self, x: Tensor) -> None:
        raise _Reached(x)
