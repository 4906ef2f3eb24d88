"""Layers whose weights stay packed in memory are unpacked one ahead, on a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from kvpack.runtime.linear import PackedTensors

Unpacked = list[dict[str, Tensor]]


def packed_modules(layer: nn.Module) -> list[PackedTensors]:
    """Modules of a decoder layer that hold something packed."""
    return [m for m in layer.modules() if isinstance(m, PackedTensors) and m.blobs]


class UnpackAhead:
    """A ring of two slots: the layer that computes, and the next one that will.

    Hooks in front of the layers start and await the work. Whoever runs a layer without them, or two
    forwards at once, finds its weights still: modules then unpack on the spot.

    Args:
        layers: decoder layers by number; those that hold nothing packed are left alone.
    """

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self._modules = {i: found for i, layer in sorted(layers.items()) if (found := packed_modules(layer))}
        self._order = list(self._modules)
        self._slots: dict[int, Future[Unpacked]] = {}
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvpack-unpack")
        self._hooks = [
            layers[i].register_forward_pre_hook(lambda *_, number=i: self.enter(number)) for i in self._order
        ]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that stay packed."""
        return tuple(self._order)

    def enter(self, number: int) -> None:
        """Make the layer's tensors ready, give back the others', and begin with the next layer's.

        Raises:
            ArtifactError: a block of this layer is damaged.
        """
        with self._lock:
            following = self._order[(self._order.index(number) + 1) % len(self._order)]
            ready = self._slot(number)
            for other in self._slots.keys() - {number, following}:
                self._give_back(other)
            try:
                tensors = ready.result()
            except BaseException:
                self._give_back(number)
                raise
            lend(self._modules[number], tensors)
            self._slot(following)

    def _slot(self, number: int) -> Future[Unpacked]:
        if number not in self._slots:
            self._slots[number] = self._worker.submit(unpack_all, self._modules[number])
        return self._slots[number]

    def _give_back(self, number: int) -> None:
        """Empty a slot, unless it is still being filled."""
        slot = self._slots.get(number)
        if slot is not None and (slot.cancel() or slot.done()):
            del self._slots[number]
            lend(self._modules[number], None)

    def close(self) -> None:
        """Remove the hooks and end the thread."""
        for hook in self._hooks:
            hook.remove()
        self._worker.shutdown(wait=True, cancel_futures=True)
        for modules in self._modules.values():
            lend(modules, None)
        self._slots.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model unpacks on the spot: threads are not copied."""


def unpack_all(modules: Sequence[PackedTensors]) -> Unpacked:
    """The tensors of every module, unpacked."""
    return [module.unpacked() for module in modules]


def lend(modules: Sequence[PackedTensors], tensors: Unpacked | None) -> None:
    """Let modules compute with these tensors; None takes them back."""
    for i, module in enumerate(modules):
        module.lent = None if tensors is None else tensors[i]
