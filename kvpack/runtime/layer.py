"""The compressed cache of one attention layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpack.core.errors import UsageError
from kvpack.core.roles import Plane
from kvpack.core.types import CacheView, Rope, Site, State
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.runtime.attention import Call, attend
from kvpack.runtime.holdings import Holdings
from kvpack.runtime.overlay import Overlay
from kvpack.runtime.plane import PlaneCache
from kvpack.runtime.revisions import Revisions
from kvpack.runtime.tokens import TokenTrack

MOST_QUERIES = 8
"""New tokens in a pass for which attention reads the codes; with more, decoding once is faster."""


class KVPackLayer(Holdings, Revisions, CacheLayerMixin):
    """Keys and values of one layer under a plan, behind transformers' cache interface.

    Args:
        plan: transforms, codecs and policy.
        states: state of the online transforms of each plane, in order, and of its codec.
        rope: the layer's rotary embedding, for transforms that need it.
        track: positions and padding, shared by the layers of a cache.
        exact_prefill: see `KVPackCache`.

    `routed` tells, for the pass that comes next, that its attention will call `attention`.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        plan: KVLayerPlan,
        states: Mapping[str, tuple[State, ...]],
        rope: Rope | None,
        track: TokenTrack,
        *,
        exact_prefill: bool = True,
    ) -> None:
        super().__init__()
        self.plan, self.track, self.exact_prefill = plan, track, exact_prefill
        self.sliding_window = plan.window
        self.is_sliding = plan.attention.window is not None
        self.record_past = False
        self._states, self._rope = states, rope
        self._planes: dict[Plane, PlaneCache] = {}
        self._encoded_before_reset = 0
        self.routed = False
        self._unread: int | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, dtype and device from the first keys and values [B, K, T, D]."""
        self._planes = self._make_planes(key_states, value_states)
        self._overlay = Overlay(key_states)
        self._memory: State = {}
        self.batch_size = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _make_planes(self, key_states: Tensor, value_states: Tensor) -> dict[Plane, PlaneCache]:
        """Empty planes for what `_append` will put into them."""
        return {"key": self._make_plane("key", key_states), "value": self._make_plane("value", value_states)}

    def _make_plane(self, name: Plane, like: Tensor) -> PlaneCache:
        site = Site(self.plan.attention.layer, self._rope, None, like.shape[1])
        states = [{n: t.to(like.device) for n, t in state.items()} for state in self._states[name]]
        placement = partial(self.plan.policy.placement, plane=name)
        return PlaneCache(self.plan.plane(name), placement, states, site, like)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, T, D]; return everything the new tokens may attend to.

        Older tokens come back as stored (decoded, exact in the tail or where protected), the new
        ones exactly, unless the cache was made with ``exact_prefill=False``.

        Raises:
            UsageError: the cache was not told of this forward pass.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.check_read()
        past, new = self.get_seq_length(), key_states.shape[2]
        self._check_announced(past + new, key_states.shape[0])
        start = self._window_start(past)
        self._protect(key_states, value_states, past)
        if self._on_codes(key_states):
            self._append(key_states, value_states)
            self._unread = start
            return key_states, value_states
        held = self._read(start, past, key_states, value_states) if self.exact_prefill else None
        self._append(key_states, value_states)
        if held is None:
            self._encode(start)
            held = self._read(start, past + new)
            self._drop()
        elif not self.record_past:
            self._encode(self._window_start(past + new))
            self._drop()
        return held

    def _on_codes(self, key_states: Tensor) -> bool:
        """Whether attention over the stored tokens comes next, for this pass; it gives no gradients."""
        routed, self.routed = self.routed, False
        if not routed or key_states.shape[2] > MOST_QUERIES:
            return False
        gradients = torch.is_grad_enabled() and key_states.requires_grad
        return not gradients and any(self.stored_tokens.values())

    def check_read(self) -> None:
        """Refuse to go on when attention saw the new tokens only, because `attention` was not called.

        Raises:
            UsageError: that is so.
        """
        if self._unread is not None:
            raise UsageError(
                f"layer {self.plan.attention.layer}: attention did not read what the cache holds",
                why="the pass ended, or went another way, between the cache and its attention function",
                hint="start a new cache; KVPACK_KERNELS=reference lets any attention read a dense cache",
            )

    def attention(self, call: Call) -> Tensor | None:
        """Attention over everything stored, [B, T, H, D]; None where `update` returned it to be read.

        Encodes what leaves the tails afterwards, as `update` does otherwise.
        """
        if self._unread is None:
            return None
        start, self._unread = self._unread, None
        length = self.get_seq_length()
        if not self.exact_prefill:
            self._encode(start)
        with torch.no_grad():
            out = attend(call, self._planes["key"], self._planes["value"], self._overlay, self.track, start)
        if self.exact_prefill and not self.record_past:
            self._encode(self._window_start(length))
        if not (self.exact_prefill and self.record_past):
            self._drop()
        return out

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        self._planes["key"].append(key_states)
        self._planes["value"].append(value_states)

    def see_input(self, x: Tensor) -> None:
        """What attention is given [B, T, C], before `update`; ignored where it is not stored."""

    @property
    def sees_attention(self) -> bool:
        """Whether `attend` must be called between `update` and attention."""
        return False

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What attention shall read instead of what `update` returned; None leaves it as it is.

        Args:
            query: [B, H, T, D] of the update's tokens.
            key: as `update` returned them, [B, K, S, D].
            value: the same.
            mask: as attention is given it, see `kvpack.models.attention_interface.visible`.
            scaling: factor of the scores.
        """
        return None

    def _check_announced(self, length: int, batch: int) -> None:
        if (self.track.length, self.track.batch) != (length, batch):
            raise UsageError(
                f"layer {self.plan.attention.layer}: the cache does not know of these tokens",
                why=f"{self.track.length} were announced, {length} would be cached",
                hint="run the model that kvpack.load returned; it tells its cache of positions and padding",
            )

    def _window_start(self, length: int) -> int:
        """The oldest of `length` slots that the next token attends to."""
        return max(0, length - self.sliding_window + 1) if self.sliding_window is not None else 0

    def _protect(self, keys: Tensor, values: Tensor, past: int) -> None:
        view = CacheView(
            self.plan.attention.layer,
            keys.shape[0],
            keys.shape[2],
            self.track.seen(keys.device),
            self.track.valid_of(past, past + keys.shape[2]),
            self.track.hidden.pop(self.plan.attention.layer, None),
            self._memory,
        )
        chosen = self.plan.policy.protect(view)
        if chosen is not None:
            self._overlay.add(chosen, keys, values, past)

    def _read(self, start: int, past: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        """Slots `start` to `past` from the store and the tail, then `new` keys and values as they are."""
        if new and past == 0:
            return new[0], new[1]
        extra = new[0].shape[2] if new else 0
        planes = (self._planes["key"], self._planes["value"])
        keys, values = (
            p.tail.new_empty((*p.tail_shape[:2], past - start + extra, p.tail_shape[3])) for p in planes
        )
        with torch.no_grad():
            planes[0].read(keys, start, self.track)
            planes[1].read(values, start, self.track)
            self._overlay.write(keys, values, start)
        if new:
            keys[:, :, past - start :] = new[0]
            values[:, :, past - start :] = new[1]
        return keys, values

    def _encode(self, needed: int) -> None:
        """Encode what leaves the tails; slots before `needed` are out of the window."""
        for name, plane in self._planes.items():
            with torch.no_grad():
                plane.encode(self._leaving(name), needed, self.track, self._overlay)

    def _leaving(self, name: Plane) -> int:
        """How many of the oldest exact tokens of a plane are to be encoded now."""
        plane = self._planes[name]
        tail = plane.length - plane.boundary
        if self.exact_prefill:
            return self.plan.policy.leaving(tail, plane.block, name)
        return tail // plane.block * plane.block

    def _drop(self) -> None:
        """Free what fell out of the sliding window."""
        if self.sliding_window is not None:
            needed = self._window_start(self.get_seq_length())
            for plane in self._planes.values():
                plane.drop(needed)
            self._overlay.keep(needed, self.get_seq_length())

    def get_seq_length(self) -> int:
        """Slots so far: padding and tokens out of the window included."""
        return next(iter(self._planes.values())).length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first slot of what `update` will return for `query_length` new tokens."""
        past = self.get_seq_length()
        start = self._window_start(past)
        return past - start + query_length, start

    def get_max_length(self) -> int:
        """The model's sliding window; -1 for full attention, which has no maximum."""
        return -1 if self.plan.attention.window is None else self.plan.attention.window

    def reset(self) -> None:
        """Forget everything; the next update begins anew."""
        self._encoded_before_reset = self.encoded_tokens
        self._planes, self.is_initialized, self.record_past = {}, False, False
        self._unread = None

    def offload(self) -> None:
        """Refused: the compressed cache stays on the model's device."""
        raise UsageError(
            "the compressed cache cannot be offloaded", hint="pass a DynamicCache(offloading=True)"
        )

    def prefetch(self) -> None:
        """Refused, as `offload`."""
        self.offload()
