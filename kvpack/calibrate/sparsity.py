"""Thresholds of one decoder block: measured on the block as the artifact runs it, site after site.

What a site sees depends on the sites before it, so they are fitted in the order in which a token
passes them, each with those before it made sparse already, on packed weights, and on hidden states
that come from sparse blocks. Afterwards the block runs once more with everything sparse, which
counts what is kept and makes the hidden states of the next block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvpack import ops
from kvpack.calibrate.collect import InputStats
from kvpack.calibrate.stats import Accumulator, accumulator
from kvpack.core.types import Stat, State, Stream
from kvpack.models.families import ROLES
from kvpack.models.feed_forward import FeedForward
from kvpack.models.view import ModelView
from kvpack.recipe.plan import Plan
from kvpack.recipe.sparsity import THRESHOLD, SparseSite

if TYPE_CHECKING:
    from torch import Tensor, nn

_ORDER = {"q": 0, "k": 0, "v": 0, "qkv": 0, "o": 1, "gate": 2, "up": 2, "gate_up": 2, "down": 4}
"""Roles of linear layers by when a token reaches them; the activated gate of an FFN stands at 3."""


class SparseBlock(InputStats):
    """The sites of one block, behind the interface through which a pass over it is watched.

    Args:
        plan: says which sites there are; none is fine.
        layer: the block.
        view: holds it.
    """

    def __init__(self, plan: Plan, layer: int, view: ModelView) -> None:
        super().__init__({})
        self.sites = {} if plan.sparsity is None else plan.sparsity.of_layer(layer)
        self.thresholds: dict[str, Tensor] = {}
        self._view = view
        self._measured: dict[str, dict[Stat, Accumulator]] = {}
        self._kept: dict[str, int] = dict.fromkeys(self.sites, 0)
        self._seen: dict[str, int] = dict.fromkeys(self.sites, 0)
        self._open_next()

    @property
    def unfinished(self) -> bool:
        """Whether another pass is needed before everything has its threshold."""
        return bool(self._measured)

    def close(self) -> None:
        """The pass is over: fit what was measured, and go on to the next sites."""
        for name, measured in self._measured.items():
            self.thresholds[name] = self.sites[name].thresholds.fit(self._stats(name, measured))[THRESHOLD]
        self._kept, self._seen = dict.fromkeys(self.sites, 0), dict.fromkeys(self.sites, 0)
        self._open_next()

    def active(self, name: str) -> float:
        """Share of a site's numbers that was kept in the last pass."""
        return self._kept[name] / max(1, self._seen[name])

    @contextmanager
    def attached(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Measure the open sites while one batch runs, and make the fitted ones sparse."""
        with super().attached(modules):
            handles = [handle for name in self.sites for handle in self._attach(name)]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _attach(self, name: str) -> Iterator[Any]:
        if name not in self._measured and name not in self.thresholds:
            return
        module = self._view.module(name)
        if self.sites[name].kind == "input":
            # Before the hooks that bring the input to the basis of a packed weight.
            yield module.register_forward_pre_hook(
                lambda m, args: (self._pass_on(name, args[0]), *args[1:]), prepend=True
            )
            return
        parts = FeedForward.of(module, name)
        yield parts.activation.register_forward_hook(lambda m, args, out: self._pass_on(name, out))
        if parts.gated:
            maker = parts.first if parts.up is None else parts.up
            yield maker.register_forward_hook(lambda m, args, out: self._see_factor(name, out, parts.fused))

    def _pass_on(self, name: str, x: Tensor) -> Tensor:
        """Measure what comes to an open site; give back what a fitted one keeps, and count it."""
        if name in self._measured:
            self._update(name, "input", x)
            return x
        threshold = self.thresholds[name]
        self._kept[name] += int(torch.count_nonzero(x.abs() >= threshold))
        self._seen[name] += x.numel()
        return ops.thresholds.masked(x, threshold)

    def _see_factor(self, name: str, x: Tensor, fused: bool) -> None:
        if name in self._measured:
            self._update(name, "factor", x.chunk(2, -1)[1] if fused else x)

    def _update(self, name: str, stream: Stream, x: Tensor) -> None:
        for stat, found in self._measured[name].items():
            if stat.of == stream:
                found.update(x.reshape(1, 1, -1, x.shape[-1]))

    def _stats(self, name: str, measured: Mapping[Stat, Accumulator]) -> dict[str, State]:
        stats = {stat.name: found.state() for stat, found in measured.items() if found.count}
        if any(stat.of == "consumers" for stat in self.sites[name].thresholds.requires()):
            module = self._view.module(name)
            reader = module if self.sites[name].kind == "input" else FeedForward.of(module, name).down
            stats["consumers.weight"] = {"weight": reader.get_parameter("weight").float()}
        return stats

    def _open_next(self) -> None:
        """The sites that a token reaches first among those without a threshold."""
        left = {n: _place(n, site) for n, site in self.sites.items() if n not in self.thresholds}
        self._measured = {
            name: {
                stat: accumulator(stat.kind)
                for stat in self.sites[name].thresholds.requires()
                if stat.of in ("input", "factor")
            }
            for name, place in left.items()
            if place == min(left.values())
        }


def _place(name: str, site: SparseSite) -> int:
    return 3 if site.kind == "feed_forward" else _ORDER[ROLES[name.rpartition(".")[2]]]
