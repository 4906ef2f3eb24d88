"""What one layer of a cache holds, in bytes and tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kvpack.core.roles import Plane
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.plane import PlaneCache


class Holdings(ABC):
    """The figures of a cache layer; everything that is stored counts."""

    plan: KVLayerPlan
    is_initialized: bool
    batch_size: int
    _planes: dict[Plane, PlaneCache]
    _overlay: Overlay
    _encoded_before_reset: int

    @abstractmethod
    def get_seq_length(self) -> int:
        """Slots so far: padding and tokens out of the window included."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, exact tails and protected tokens."""
        planes = sum(plane.nbytes for plane in self._planes.values())
        return planes + self._overlay.nbytes if self.is_initialized else 0

    @property
    def device_nbytes(self) -> int:
        """Bytes on the model's device: all."""
        return self.nbytes

    @property
    def allocated_nbytes(self) -> int:
        """The same with the room to grow."""
        planes = sum(plane.allocated_nbytes for plane in self._planes.values())
        return planes + self._overlay.nbytes if self.is_initialized else 0

    @property
    def elements(self) -> int:
        """Numbers that an uncompressed cache would hold."""
        if not self.is_initialized:
            return 0
        held = self.plan.visible_tokens(self.get_seq_length())
        attention = self.plan.attention
        return 2 * held * self.batch_size * attention.kv_heads * attention.head_dim

    @property
    def stored_tokens(self) -> dict[Plane, int]:
        """Tokens held in encoded form."""
        return {name: plane.stored_tokens for name, plane in self._planes.items()}

    @property
    def protected_tokens(self) -> int:
        """Protected tokens, summed over the batch."""
        return len(self._overlay) if self.is_initialized else 0

    @property
    def encoded_tokens(self) -> int:
        """Tokens ever encoded, keys and values counted apart; equal to those stored unless some left."""
        return self._encoded_before_reset + sum(p.encoded_tokens for p in self._planes.values())
