"""Which layers stay packed in memory: what unpacking costs against what it saves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvpack.core.errors import UsageError

Layers = tuple[int, ...]


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer: seconds to compute one token and to unpack, bytes unpacked and packed.

    A layer whose `stored_bytes` are its `raw_bytes` has nothing to unpack.
    """

    compute: float
    unpack: float
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class Costs:
    """All layers of a model, in order.

    `rest` is the time of one token outside the layers, `fixed_bytes` the weights outside what the
    layers pack. While a layer is unpacked beside computation both slow down: `overlap_loss` is the
    share of the shorter time that is lost, 0 for free, 1 for one after the other.
    """

    layers: tuple[LayerCost, ...]
    rest: float = 0.0
    fixed_bytes: int = 0
    overlap_loss: float = 0.0

    @property
    def packable(self) -> Layers:
        """Layers that can stay packed."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.stored_bytes < layer.raw_bytes)

    @property
    def base_seconds(self) -> float:
        """One token with everything unpacked."""
        return self.rest + sum(layer.compute for layer in self.layers)

    def overlaps(self, packed: Layers) -> list[tuple[float, float]]:
        """Per packed layer: seconds computed while the next one is unpacked, seconds of unpacking that.

        The first follows the last: the next token. Two layers stay unpacked, there is room for them.
        """
        if len(packed) < 3:
            return []
        around = (*packed, packed[0] + len(self.layers))
        found = []
        for here, there in pairwise(around):
            between = (self.layers[i % len(self.layers)].compute for i in range(here, there))
            rest = self.rest if there >= len(self.layers) else 0.0
            found.append((sum(between) + rest, self.layers[there % len(self.layers)].unpack))
        return found

    def seconds(self, packed: Layers) -> float:
        """One token with these layers packed."""
        waits = (max(0.0, u - c) + self.overlap_loss * min(u, c) for c, u in self.overlaps(packed))
        return self.base_seconds + sum(waits)

    def with_measured(self, packed: Layers, seconds: float) -> Costs:
        """With the overlap loss under which `seconds` is what these layers take."""
        overlaps = self.overlaps(packed)
        free = self.base_seconds + sum(max(0.0, u - c) for c, u in overlaps)
        shorter = sum(min(u, c) for c, u in overlaps)
        loss = min(1.0, max(0.0, (seconds - free) / shorter)) if shorter else 0.0
        return Costs(self.layers, self.rest, self.fixed_bytes, loss)

    def worth(self, layer: int) -> float:
        """Bytes that a layer saves per second of unpacking it."""
        cost = self.layers[layer]
        return (cost.raw_bytes - cost.stored_bytes) / cost.unpack if cost.unpack else float("inf")

    def saved_bytes(self, packed: Layers) -> int:
        """Memory that these layers save, less the two of them that are unpacked at a time."""
        unpacked = sorted((self.layers[i].raw_bytes for i in packed), reverse=True)[:2]
        return sum(self.layers[i].raw_bytes - self.layers[i].stored_bytes for i in packed) - sum(unpacked)

    def held_bytes(self, packed: Layers) -> int:
        """Memory of all weights with these layers packed."""
        return self.fixed_bytes + sum(layer.raw_bytes for layer in self.layers) - self.saved_bytes(packed)


def spread(layers: Sequence[int], count: int) -> Layers:
    """`count` of `layers`, evenly spread, so that there is time between them (Bresenham)."""
    return tuple(layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count))


def within_time(costs: Costs, slowdown: float) -> Layers:
    """The layers that save most memory while a token takes at most ``1 + slowdown`` of its time.

    Evenly spread sets first, then what can still be added; none where nothing would be saved.

    Raises:
        UsageError: `slowdown` is negative.
    """
    if slowdown < 0:
        raise UsageError(f"a slow-down cannot be {slowdown}", hint="give 0.05 for five per cent")
    limit = (1 + slowdown) * costs.base_seconds
    sets = [spread(costs.packable, count) for count in range(len(costs.packable) + 1)]
    starts = [s for s in sets if costs.seconds(s) <= limit]
    best = max((_extended(costs, s, limit) for s in starts[:1] + starts[-2:]), key=costs.saved_bytes)
    return best if costs.saved_bytes(best) > 0 else ()


def _extended(costs: Costs, packed: Layers, limit: float) -> Layers:
    """With every further layer that fits, those first that save most per second of unpacking."""
    for i in sorted(costs.packable, key=costs.worth, reverse=True):
        more = tuple(sorted({*packed, i}))
        if costs.seconds(more) <= limit:
            packed = more
    return packed


def within_memory(costs: Costs, nbytes: int) -> Layers:
    """The layers whose packing costs least time while all weights take at most `nbytes`.

    Raises:
        UsageError: not even with every layer packed.
    """
    if costs.held_bytes(()) <= nbytes:
        return ()
    sets = [spread(costs.packable, count) for count in range(1, len(costs.packable) + 1)]
    fitting = [s for s in sets if costs.held_bytes(s) <= nbytes]
    if not fitting:
        least = min(costs.held_bytes(s) for s in (*sets, ()))
        raise UsageError(
            f"the weights take {least:,} bytes at least, allowed are {nbytes:,}",
            hint="allow more, or export with fewer bits",
        )
    best = min(fitting, key=costs.seconds)
    while found := _faster(costs, best, nbytes):
        best = found
    return best


def _faster(costs: Costs, packed: Layers, nbytes: int) -> Layers:
    """The fastest set with one layer less that still fits; empty if there is none."""
    fewer = (_without(packed, i) for i in packed)
    fitting = (s for s in fewer if s and costs.held_bytes(s) <= nbytes)
    best = min(fitting, key=costs.seconds, default=())
    return best if best and costs.seconds(best) < costs.seconds(packed) else ()


def _without(packed: Collection[int], gone: int) -> Layers:
    return tuple(i for i in packed if i != gone)
