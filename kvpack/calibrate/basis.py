"""Fitting changes of basis inside a block, and proving that they leave its function as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvpack.calibrate.collect import Chain
from kvpack.core.errors import UnsupportedModel
from kvpack.core.model_spec import AttentionSpec, ModelSpec
from kvpack.core.types import Site, State, Stream
from kvpack.folding import Folding
from kvpack.models.view import ModelView
from kvpack.recipe.basis import BasisPlan, site_shape
from kvpack.recipe.plane_plan import PlanePlan

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_CHANGE = 1e-3
"""Largest relative difference (Frobenius) of a block's output in float32 before and after folding."""


def fit_basis(
    changes: Sequence[BasisPlan],
    view: ModelView,
    attention: AttentionSpec,
    folding: Folding,
    measure: Callable[[], None],
    sample: Callable[[], Tensor],
) -> None:
    """Fit the changes of basis inside one block, and fold them into it.

    Changes of different tensors are measured together; a second one of the same tensor, in the
    basis of the first.

    Args:
        changes: of the block, in order.
        view: the model; the block is loaded.
        attention: of the block.
        folding: is told what was fitted, and gives tensors in the new basis.
        measure: runs every sample through the block.
        sample: runs a few, and gives what the block makes of them.

    Raises:
        UnsupportedModel: the block then computes something else than before.
    """
    left, fitted = list(changes), list[str]()
    while left:
        places = [change.place.name for change in left]
        count = next((i for i, name in enumerate(places) if name in places[:i]), len(left))
        fits = BasisFits(left[:count], view, attention)
        while fits.unfinished:
            with fits.attached():
                measure()
            fits.close()
        # Numbers that were rounded to their dtype after an earlier round would count as a change.
        view.fill({name: folding.exact(name) for name in fitted})
        before = sample()
        folding.basis.update({change.number: fits.states(change) for change in fits.changes})
        fitted = sorted({*fitted, *(name for change in fits.changes for name in folding.names(change))})
        view.fill({name: folding.exact(name) for name in fitted})
        _check_same(before, sample(), attention.layer, view.spec)
        view.fill({name: folding.read(name) for name in fitted})
        left = left[count:]


class BasisFits:
    """Measures the tensors of some changes of basis of one block, and fits their transforms.

    All are measured in the block as it was; a second transform at the same place sees the basis of
    the first.

    Args:
        changes: of one block.
        view: the model; the block is loaded.
        attention: of the block.
    """

    def __init__(self, changes: Sequence[BasisPlan], view: ModelView, attention: AttentionSpec) -> None:
        self.changes, self.view, self.attention = changes, view, attention
        self._chains: dict[int, Chain] = {}
        for change in changes:
            self._chains[change.number] = self._chain(change)

    def _chain(self, change: BasisPlan) -> Chain:
        plane = PlanePlan(change.transforms, False, (), change.states)
        at = Site(self.attention.layer, kv_heads=1)
        if change.role == "attention_output":
            at = replace(at, kv_heads=self.attention.kv_heads)

        def given(stream: Stream) -> State:
            rows = self._readers(change)[None]
            chain = self._chains.get(change.number)
            for transform, state in zip(change.transforms, chain.states if chain else (), strict=False):
                rows = transform.query(rows, state, at)
            return {"weight": rows[0]}

        return Chain(plane, at, given)

    def _readers(self, change: BasisPlan) -> Tensor:
        """Rows of all readers, in the layout of the site: [K, N, D]."""
        rows = [self._tensor(name) for name in change.place.readers]
        return self._wide(change, torch.cat(rows)[None])[0]

    def _tensor(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return self.view.module(path).get_parameter(leaf).float()

    def _wide(self, change: BasisPlan, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, K, N, D]: behind attention the query heads of a kv head follow each other."""
        batch, tokens, _ = x.shape
        _, heads, _, channels = site_shape(change.place, self.attention)
        apart = x.reshape(batch, tokens, heads, -1, channels)
        return apart.permute(0, 2, 3, 1, 4).reshape(batch, heads, -1, channels)

    @property
    def unfinished(self) -> bool:
        """Whether another pass over the data is needed."""
        return any(chain.passes for chain in self._chains.values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch what the readers are given while the block runs."""
        with ExitStack() as stack:
            for change in self.changes:
                if self._chains[change.number].passes:
                    for name in self._watched(change):
                        module = self.view.module(name.rpartition(".")[0])
                        hook = self._hook(change)
                        stack.callback(module.register_forward_pre_hook(hook).remove)
            yield

    def _watched(self, change: BasisPlan) -> tuple[str, ...]:
        """The readers whose inputs are all of the tensor: one, or where tokens are routed the router."""
        own = {linear.weight for linear in self.view.spec.linears}
        whole = [name for name in change.place.readers if name not in own]
        return tuple(whole or change.place.readers)[:1]

    def _hook(self, change: BasisPlan) -> Any:
        def see(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            self._chains[change.number].see(self._wide(change, x.reshape(1, -1, x.shape[-1])))

        return see

    def close(self) -> None:
        """The pass is over."""
        for chain in self._chains.values():
            chain.close()

    def states(self, change: BasisPlan) -> list[State]:
        """What the transforms of a change have learned."""
        return self._chains[change.number].states


def _check_same(before: Tensor, after: Tensor, layer: int, model: ModelSpec) -> None:
    """Refuse changes of basis that are none in this model.

    Raises:
        UnsupportedModel: the block computes something else than before.
    """
    change = float((after - before).norm() / before.norm().clamp(min=1e-30))
    if not change <= LARGEST_CHANGE:
        raise UnsupportedModel(
            f"a change of basis changes what decoder block {layer} computes",
            where=model.architecture,
            why=f"its outputs differ by {change:.2g} of their size",
            hint="leave the section basis out of the recipe for this model",
        )
