"""The plan of a layer that stores its attention input in the place of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvpack.core.roles import Plane
from kvpack.core.types import TensorSpec


@dataclass(frozen=True)
class InputsPlan:
    """What a layer stores in the place of keys and values: its attention input X [B, T, C].

    `bases` are the orthonormal bases U [C, r], one per stored plane, in which X is stored; none
    where X is stored itself. `link` tells that X is reconstructed for the next layer: by a "base"
    layer from its codes alone, by a "difference" layer from the layer before and its codes. `tap`
    tells whether X is taken behind the decoder layer's norm or before it.
    """

    channels: int
    bases: Mapping[Plane, TensorSpec]
    link: Literal["base", "difference"] | None = None
    tap: Literal["post_norm", "residual"] = "post_norm"

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes that are stored; X itself takes the value plane alone."""
        return ("key", "value") if "key" in self.bases else ("value",)

    def width(self, plane: Plane) -> int:
        """Channels of a stored plane."""
        return self.bases[plane].shape[1] if plane in self.bases else self.channels


def basis_name(layer: int, plane: str) -> str:
    """Name of the basis of a plane that stores inputs."""
    return f"layers.{layer}.{plane}.basis"
