"""Solving the weights of one decoder block, layer after layer or all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from kvpack.calibrate import experts
from kvpack.calibrate.collect import Chain, InputStats
from kvpack.calibrate.hooks import coded, turned
from kvpack.calibrate.passes import Passes, Weights
from kvpack.calibrate.staged import Repeated, Stage, Waiting, find_stages, fits, held_bytes
from kvpack.core.types import Stat


class BlockSolver:
    """Packs what is packed of a block, and measures its keys and values on the way.

    Args:
        layer: the block; it is loaded.
        weights: its packed layers, by path.
        chains: measure keys and values.
        passes: run the samples through it.
        replace: solves layers from statistics and puts the approximations in place.
    """

    def __init__(
        self,
        layer: int,
        weights: Weights,
        chains: Mapping[str, Chain],
        passes: Passes,
        replace: Callable[[Weights, InputStats], None],
    ) -> None:
        self.layer, self.weights, self.chains = layer, weights, chains
        self.passes, self.view, self.replace = passes, passes.view, replace

    def solve(self, *, in_order: bool, keep: bool) -> bool:
        """Solve all weights.

        Args:
            in_order: every layer is measured behind the packed ones before it.
            keep: whether the block's outputs will be wanted.

        Returns:
            Whether the hidden states are the packed block's outputs already.
        """
        return self._in_order(keep) if in_order else self._at_once(keep)

    def _at_once(self, keep: bool) -> bool:
        """Measure everything in the unpacked block."""
        inputs = InputStats(_wanted(self.weights))
        kept, passes = False, max([bool(inputs.wanted), *(c.passes for c in self.chains.values())])
        for index in range(passes):
            kept = keep and not self.weights and index == passes - 1
            self._run(self.chains, inputs if index == 0 else InputStats({}), keep=kept)
        self.replace(self.weights, inputs)
        return kept

    def _in_order(self, keep: bool) -> bool:
        """Pack every layer before it is passed; chains see keys and values of packed projections.

        Layers that batches may call in different orders, such as those of experts, are measured
        together, behind those before them.
        """
        self.replace({n: w for n, w in self.weights.items() if not w.solver.requires()}, InputStats({}))
        stages = self._stages()
        left = _wanted(self.weights).keys() - {name for stage in stages for name in stage}
        kept = False
        if keep and not left:
            experts.release(self.view, self.layer)
        if stages:
            solved, kept = self._staged(stages, {} if left else self.chains, keep=keep and not left)
            left |= {name for stage in stages[solved:] for name in stage}
        if left:
            self._rest(left)
        if keep:
            experts.release(self.view, self.layer)
        passes = max((chain.passes for chain in self.chains.values()), default=0)
        for index in range(passes):
            kept = keep and index == passes - 1
            self._run(self.chains, InputStats({}), keep=kept, packed=self.weights)
        return kept

    def _stages(self) -> list[Stage]:
        """Layers to solve, in the order in which a batch calls them, see `find_stages`."""
        modules = {name: self.view.module(name) for name in _wanted(self.weights)}
        if not modules:
            return []
        with turned(self.view, self.weights):
            trial = partial(self.passes.trial, self.layer)
            return find_stages(modules, trial, experts.inside(self.view, self.layer))

    def _staged(self, stages: list[Stage], chains: Mapping[str, Chain], *, keep: bool) -> tuple[int, bool]:
        """Solve stage after stage; how many were solved, and whether the outputs are kept already."""
        wait = fits(self._held_bytes())
        chains = chains if wait and any(chain.passes for chain in chains.values()) else {}
        kept = keep and wait and all(chain.passes <= 1 for chain in chains.values())
        modules = {name: self.view.module(name) for stage in stages for name in stage}
        through = partial(self.passes.through, self.layer, chains=chains)
        flow = (Waiting if wait else Repeated)(
            stages, modules, _wanted(self.weights), self._solve_stage, through
        )
        with (
            turned(self.view, self.weights),
            flow.attached(list(self.passes.batches())),
            coded(self.view, self.weights),
            self.passes.watching(self.layer, chains),
        ):
            whole = flow.run()
            for part, result in flow.results() if whole and (kept or chains) else ():
                if kept:
                    self.passes.keep(self.layer, part, result)
        for chain in chains.values():
            chain.close(whole=whole)
        return flow.solved, whole and kept

    def _solve_stage(self, stage: Stage, inputs: InputStats) -> None:
        self.replace({name: self.weights[name] for name in stage}, inputs)

    def _rest(self, left: set[str]) -> None:
        """Measure the layers that no stage has, and solve them."""
        rest = {name: weight for name, weight in self.weights.items() if name in left}
        packed = {name: weight for name, weight in self.weights.items() if name not in left}
        inputs = InputStats(_wanted(rest))
        self._run({}, inputs, keep=False, packed=packed)
        self.replace(rest, inputs)

    def _run(
        self, chains: Mapping[str, Chain], inputs: InputStats, *, keep: bool, packed: Weights | None = None
    ) -> None:
        self.passes.run(self.layer, self.weights, chains, inputs, keep=keep, packed=packed)

    def _held_bytes(self) -> int:
        """What the batches hold while they wait."""
        model = self.view.spec
        widest = max(weight.linear.shape[1] for weight in self.weights.values())
        eager = "eager" in str(self.view.model.config._attn_implementation)
        samples, tokens = self.passes.tokens.shape
        at = model.attention[self.layer]
        return held_bytes(samples, tokens, model.hidden_size, widest, at, eager=eager)


def _wanted(weights: Weights) -> dict[str, frozenset[Stat]]:
    """Statistics of those layers whose solvers ask for some."""
    wanted = {name: weight.solver.requires() for name, weight in weights.items()}
    return {name: stats for name, stats in wanted.items() if stats}
