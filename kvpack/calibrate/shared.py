"""Several plans calibrated in the same passes over the decoder blocks.

Plans that leave the weights alone see the same keys and values, whatever their caches do to them.
One sweep then serves all: each pass over a block feeds the parts of every plan. Transforms
are not folded into the block for it, which changes nothing that the block computes; their chains
apply them to what is seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

import torch

from kvpack.calibrate.collect import Chain, InputStats
from kvpack.calibrate.data import Samples
from kvpack.calibrate.gradients import Gradients, gradients_for
from kvpack.calibrate.identity import identity, needs_calibration
from kvpack.calibrate.sequential import Sweep, calibrate, check
from kvpack.calibrate.writer import CalibrationWriter
from kvpack.core.errors import KvpackError
from kvpack.core.progress import SILENT, Progress
from kvpack.core.types import Stream
from kvpack.models.attention_interface import observe
from kvpack.models.view import ModelView
from kvpack.recipe.kv_plan import CHAINS, KVLayerPlan
from kvpack.recipe.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor


def sharing(plans: Sequence[Plan], hashes: Mapping[str, str]) -> list[list[list[int]]]:
    """Which plans of one model can be calibrated together.

    Returns:
        Groups that share passes, each a list of sets of plans whose calibrations would be equal;
        plans by index. Those that need no calibration are in none.
    """
    equal: dict[str, list[int]] = {}
    for index, plan in enumerate(plans):
        if needs_calibration(plan):
            equal.setdefault(json.dumps(identity(plan, hashes), sort_keys=True), []).append(index)
    groups: dict[object, list[list[int]]] = {}
    for same in equal.values():
        plan = plans[same[0]]
        key = plan.recipe.recipe.calibration if _passive(plan) else same[0]
        groups.setdefault(key, []).append(same)
    return list(groups.values())


def _passive(plan: Plan) -> bool:
    """Whether calibrating the plan changes no weight."""
    return not plan.weights and not plan.basis and plan.sparsity is None


def _asks(plan: Plan, stream: Stream) -> bool:
    return any(stat.of == stream for part in plan.kv_parts() for stat in part.requires())


def calibrate_all(
    plans: Sequence[Plan],
    folder: Path,
    samples: Callable[[Plan], Samples],
    *,
    hashes: Mapping[str, str],
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> list[Path | KvpackError | None]:
    """Calibrate every plan that needs it into folders below `folder`; `samples` draws a plan's text.

    Returns:
        Per plan: the calibration's folder, why it failed, or None where none is needed.
    """
    made: list[Path | KvpackError | None] = [None] * len(plans)
    for group in sharing(plans, hashes):
        leaders = [plans[same[0]] for same in group]
        outs = [folder / f"calibration-{same[0]}" for same in group]
        found: Sequence[Path | KvpackError]
        try:
            found = calibrate_shared(
                leaders,
                samples(leaders[0]),
                outs,
                hashes=hashes,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        except KvpackError as error:
            found = [error] * len(group)
        for same, result in zip(group, found, strict=True):
            for index in same:
                made[index] = result
    return made


def calibrate_shared(
    plans: Sequence[Plan],
    samples: Samples,
    outs: Sequence[Path],
    *,
    hashes: Mapping[str, str],
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> list[Path | KvpackError]:
    """Calibrate a group that `sharing` found, each plan into its own folder.

    The folders equal those that `kvpack.calibrate.sequential.calibrate` writes. A plan that
    cannot be fitted does not disturb the others.

    Returns:
        Per plan, its folder or the reason why there is none.

    Raises:
        SourceError: the tokenizer does not belong to the model, or the model computes NaN.
        UsageError: samples are longer than the model can read, or a folder exists.
    """
    if len(plans) == 1:
        trust = trust_remote_code
        made = calibrate(
            plans[0], samples, outs[0], hashes=hashes, trust_remote_code=trust, progress=progress
        )
        return [made.path]
    check(plans[0], samples)
    members = [_Member(plan, out) for plan, out in zip(plans, outs, strict=True)]
    with ExitStack() as stack, torch.no_grad():
        for member in members:
            stack.enter_context(member)
        view = ModelView.build(plans[0].model, trust_remote_code=trust_remote_code)
        if any(_asks(plan, "query") for plan in plans):
            observe(view.model)
        asking = next((m for m in members if _asks(m.plan, "gradient")), members[0])
        with gradients_for(asking.plan, view, samples.tokens, asking.writer.folder, progress) as gradients:
            _SharedSweep(members, view, samples.tokens, progress, gradients).all_blocks()
        for member in members:
            if member.error is None:
                member.writer.finish(identity(member.plan, hashes), samples)
    return [member.out if member.error is None else member.error for member in members]


class _Member:
    """One plan of a group with its folder, which appears on leaving unless the plan failed."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out
        self.writer = CalibrationWriter(out)
        self.error: KvpackError | None = None
        self.kv = {x.attention.layer: x for x in plan.kv}

    def __enter__(self) -> _Member:
        self.writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.error is not None and error is None:
            kind, error = type(self.error), self.error
        self.writer.__exit__(kind, error, trace)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Do what this plan asks for, until it has failed; keep its first failure."""
        try:
            yield
        except KvpackError as error:
            self.error = self.error or error


class _Chains:
    """The chains of one plane for all members, behind the interface of one."""

    def __init__(self, chains: Sequence[tuple[_Member, Chain]]) -> None:
        self._all = chains

    @property
    def _alive(self) -> Iterator[tuple[_Member, Chain]]:
        return (pair for pair in self._all if pair[0].error is None)

    @property
    def passes(self) -> int:
        """Passes until every chain is fitted."""
        return max((chain.passes for _, chain in self._alive), default=0)

    def wants(self, stream: Stream) -> bool:
        """Whether any chain looks at gradients or queries now."""
        return any(chain.wants(stream) for _, chain in self._alive)

    def see(self, x: Tensor, gradient: Tensor | None = None) -> None:
        """Show keys or values to every chain."""
        for member, chain in self._alive:
            with member.guarded():
                chain.see(x, gradient)

    def see_queries(self, query: Tensor) -> None:
        """Show queries to every chain."""
        for member, chain in self._alive:
            with member.guarded():
                chain.see_queries(query)

    def close(self) -> None:
        """Fit what this pass has measured."""
        for member, chain in self._alive:
            with member.guarded():
                chain.close()


class _SharedSweep(Sweep):
    """The pass over the blocks for several plans."""

    def __init__(
        self,
        members: Sequence[_Member],
        view: ModelView,
        tokens: Tensor,
        progress: Progress,
        gradients: Gradients | None,
    ) -> None:
        super().__init__(members[0].plan, view, tokens, members[0].writer, progress, gradients)
        self.members = members

    def _needed(self, layer: int) -> bool:
        return any(layer in member.kv for member in self.members)

    def _block(self, layer: int, onward: bool) -> None:
        self.view.load_block(layer, self.folding, torch.float32)
        made = self._members_chains(layer)
        several = {name: _Chains([(m, c[name]) for m, c in made if name in c]) for name in CHAINS}
        chains = cast("dict[str, Chain]", several)
        passes = max(c.passes for c in chains.values())
        for index in range(max(passes, onward)):
            self.passes.run(layer, {}, chains, InputStats({}), keep=onward and index >= passes - 1)
        self.view.free_block(layer)
        for member, own in made:
            if member.error is None:
                for name, chain in own.items():
                    member.writer.add_states(layer, name, chain.states)
                member.writer.flush(f"block-{layer:05d}.safetensors")

    def _members_chains(self, layer: int) -> list[tuple[_Member, dict[str, Chain]]]:
        made: list[tuple[_Member, dict[str, Chain]]] = []
        for member in self.members:
            kv: KVLayerPlan | None = member.kv.get(layer)
            if member.error is None and kv is not None:
                with member.guarded():
                    made.append((member, self._chains(kv)))
        return made
