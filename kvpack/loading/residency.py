"""What stays packed in memory: as told, or measured on this machine and chosen for a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from kvpack.core.errors import UsageError
from kvpack.models.skeleton import decoder_blocks
from kvpack.runtime.linear import PackedTensors
from kvpack.runtime.residency import Costs, LayerCost, spread, within_memory, within_time
from kvpack.runtime.unpacking import UnpackAhead, lend, packed_modules, unpack_all

PROBES = 5
"""Tokens that a time is the median of."""


@dataclass(frozen=True)
class Residency:
    """Which decoder layers stay packed in memory, and what comes of it.

    `saved_bytes` are the sum over these layers less what two of them take unpacked, of `raw_bytes`
    that all weights take unpacked. Seconds are those of one token: with everything unpacked, predicted
    and measured; None where nothing was measured.
    """

    packed: tuple[int, ...]
    layers: int
    raw_bytes: int
    saved_bytes: int
    base_seconds: float | None = None
    predicted_seconds: float | None = None
    measured_seconds: float | None = None


@dataclass(frozen=True)
class Wanted:
    """One of: layers by number, how many, "raw" or "compressed"; a slow-down; bytes for all weights."""

    resident: str | int | Sequence[int] = "raw"
    max_slowdown: float | None = None
    max_weight_bytes: int | None = None

    def __post_init__(self) -> None:
        limits = [x for x in (self.max_slowdown, self.max_weight_bytes) if x is not None]
        if len(limits) + (self.resident != "raw") > 1:
            raise UsageError(
                "resident, max_slowdown and max_weight_bytes say the same thing in different ways",
                hint="give one of them",
            )
        if isinstance(self.resident, str) and self.resident not in ("raw", "compressed"):
            raise UsageError(f"resident cannot be {self.resident!r}", hint="raw, compressed, or layers")

    @property
    def anything(self) -> bool:
        """Whether anything may stay packed."""
        return self != Wanted()


def label_packed(model: nn.Module) -> None:
    """Let packed modules know their names, for errors."""
    for name, module in model.named_modules():
        if isinstance(module, PackedTensors):
            module.label = name


def unpack_model(model: nn.Module) -> None:
    """Unpack everything for good.

    Raises:
        ArtifactError: a block is damaged.
    """
    for module in model.modules():
        if isinstance(module, PackedTensors):
            module.keep_unpacked()


def settle(model: Any, wanted: Wanted) -> Residency:
    """Choose what stays packed, unpack the rest for good, and set up what unpacks ahead.

    The choice is also left on the model, as ``kvpack_residency``.

    Raises:
        UsageError: nothing of the model is losslessly coded, or the limit cannot be kept.
    """
    layers = list(decoder_blocks(model)[1])
    costs = _sizes(model, layers)
    if not costs.packable:
        raise UsageError(
            "no decoder layer of this artifact is losslessly coded",
            hint="export with a recipe that has storage: {packer: ...}, such as lossless",
        )
    for module in set(model.modules()) - {m for layer in layers for m in layer.modules()}:
        if isinstance(module, PackedTensors):
            module.keep_unpacked()
    if wanted.max_slowdown is None and wanted.max_weight_bytes is None:
        return _told(model, layers, costs, wanted.resident)
    return _measured(model, layers, costs, wanted)


def _told(model: Any, layers: Sequence[nn.Module], costs: Costs, resident: Any) -> Residency:
    if resident == "compressed":
        packed = costs.packable
    elif isinstance(resident, int):
        packed = spread(costs.packable, min(resident, len(costs.packable)))
    else:
        packed = tuple(sorted(set(resident)))
        if odd := set(packed) - set(costs.packable):
            raise UsageError(f"layer {sorted(odd)[0]} is not there, or not losslessly coded")
    _install(model, layers, packed)
    return _report(model, costs, packed)


def _measured(model: Any, layers: Sequence[nn.Module], costs: Costs, wanted: Wanted) -> Residency:
    costs = _times(model, layers, costs)
    ahead = UnpackAhead(dict(enumerate(layers)))
    costs = costs.with_measured(costs.packable, step_seconds(model))
    ahead.close()
    if wanted.max_slowdown is not None:
        packed = within_time(costs, wanted.max_slowdown)
    else:
        packed = within_memory(costs, wanted.max_weight_bytes or 0)
    _install(model, layers, packed)
    return _report(model, costs, packed, step_seconds(model) if packed else costs.base_seconds)


def _install(model: Any, layers: Sequence[nn.Module], packed: Sequence[int]) -> None:
    for i, layer in enumerate(layers):
        for module in packed_modules(layer) if i not in packed else ():
            module.keep_unpacked()
    if packed:
        model.kvpack_unpacking = UnpackAhead({i: layers[i] for i in packed})


def _report(model: Any, costs: Costs, packed: tuple[int, ...], measured: float | None = None) -> Residency:
    timed = measured is not None
    found = Residency(
        packed,
        len(costs.layers),
        costs.held_bytes(()),
        costs.saved_bytes(packed),
        costs.base_seconds if timed else None,
        costs.seconds(packed) if timed else None,
        measured,
    )
    model.kvpack_residency = found
    return found


def _sizes(model: nn.Module, layers: Sequence[nn.Module]) -> Costs:
    found = []
    for layer in layers:
        blobs = [(m, name, spec) for m in packed_modules(layer) for name, spec in m.blobs.items()]
        raw = sum(spec.nbytes for _, _, spec in blobs)
        found.append(LayerCost(0.0, 0.0, raw, sum(m.get_buffer(name).nbytes for m, name, _ in blobs)))
    tensors = (*model.parameters(), *model.buffers())
    held = sum(t.nbytes for t in tensors) - sum(layer.stored_bytes for layer in found)
    return Costs(tuple(found), fixed_bytes=held)


def _times(model: Any, layers: Sequence[nn.Module], costs: Costs) -> Costs:
    """Time every layer while one token passes, unpacking it outside the time that it computes."""
    clocks = [_Clock(layer) for layer in layers]
    try:
        whole = [_timed(lambda: _step(model)) for _ in range(PROBES)]
    finally:
        for clock in clocks:
            clock.remove()
    found = tuple(
        LayerCost(median(clock.compute), median(clock.unpack), cost.raw_bytes, cost.stored_bytes)
        for clock, cost in zip(clocks, costs.layers, strict=True)
    )
    inside = [sum(c.compute[i] + c.unpack[i] for c in clocks) for i in range(PROBES)]
    rest = median(total - within for total, within in zip(whole, inside, strict=True))
    return Costs(found, max(0.0, rest), costs.fixed_bytes)


class _Clock:
    """Unpacks a layer when it is called, and takes both times."""

    def __init__(self, layer: nn.Module) -> None:
        self.compute: list[float] = []
        self.unpack: list[float] = []
        self._modules = packed_modules(layer)
        self._start = 0.0
        self._hooks = (layer.register_forward_pre_hook(self._enter), layer.register_forward_hook(self._leave))

    def _enter(self, *_: Any) -> None:
        self.unpack.append(_timed(lambda: lend(self._modules, unpack_all(self._modules))))
        self._start = _now()

    def _leave(self, *_: Any) -> None:
        self.compute.append(_now() - self._start)
        lend(self._modules, None)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        lend(self._modules, None)


def step_seconds(model: Any) -> float:
    """Seconds of one token alone, the median of some."""
    _step(model)
    return median(_timed(lambda: _step(model)) for _ in range(PROBES))


def _step(model: Any) -> None:
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(token, use_cache=False)


def _timed(work: Callable[[], None]) -> float:
    start = _now()
    work()
    return _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
