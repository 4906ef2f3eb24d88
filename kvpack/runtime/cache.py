"""The compressed cache of a model: what `generate()` and `forward(use_cache=True)` use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvpack.core.errors import UsageError
from kvpack.core.types import Rope, State
from kvpack.kernels import choice
from kvpack.models.rematerialise import Rematerialiser
from kvpack.recipe.inputs_plan import InputsPlan, basis_name
from kvpack.recipe.kv_plan import KVLayerPlan, state_name
from kvpack.runtime.chain import ChainedLayer, Reconstruction
from kvpack.runtime.inputs import InputsLayer
from kvpack.runtime.layer import KVPackLayer
from kvpack.runtime.narrowed import NarrowedLayer
from kvpack.runtime.ranked_layer import RankedLayer
from kvpack.runtime.retrieval import RetrievalLayer
from kvpack.runtime.tokens import TokenTrack


@dataclass(frozen=True)
class KVScheme:
    """Everything a cache of one model is made from; shared by its caches.

    `plans` holds one plan per layer, `states` the tensors of online transforms and codecs under the names
    of `kvpack.recipe.kv_plan.state_name` and bases under those of `basis_name`, `ropes` the rotary embedding
    of each layer that needs it, `remakes` what makes keys and values where a layer stores its input.

    Raises:
        UsageError: layers are missing, or a state is, or what makes keys and values.
    """

    plans: tuple[KVLayerPlan, ...]
    states: Mapping[str, Tensor] = field(default_factory=dict)
    ropes: Mapping[int, Rope] = field(default_factory=dict)
    remakes: Mapping[int, Rematerialiser] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = [plan.attention.layer for plan in self.plans]
        if layers != list(range(len(layers))) or not layers:
            raise UsageError(
                f"the KV plans cover layers {layers}", why="every attention layer needs one, in order"
            )
        expected = {name for plan in self.plans for name in plan.state_tensors()}
        if missing := sorted(expected - set(self.states)):
            raise UsageError(f"state {missing[0]!r} of the KV scheme is missing", hint="calibrate again")
        stored = {plan.attention.layer for plan in self.plans if plan.inputs is not None}
        if unmade := sorted(stored - set(self.remakes)):
            raise UsageError(f"nothing makes the keys and values of layer {unmade[0]} from its input")

    def states_of(self, plan: KVLayerPlan, chain: str) -> tuple[State, ...]:
        """State of every online transform of a chain, in order, and last of its codecs."""
        return tuple(
            {n: self.states[state_name(plan.attention.layer, chain, i, n)] for n in specs}
            for i, specs in plan.chains[chain].online_states().items()
        )

    @property
    def needs_hidden(self) -> bool:
        """Whether a policy looks at the inputs of decoder layers."""
        return any(plan.policy.needs_hidden for plan in self.plans)

    @property
    def sees_attention(self) -> bool:
        """Whether layers must be shown the queries."""
        return any(plan.sees_attention for plan in self.plans)

    @property
    def on_codes(self) -> bool:
        """Whether attention over some layer's tokens reads the codes."""
        return choice.forced() != "reference" and any(plan.reading.on_codes for plan in self.plans)

    @property
    def needs_rope(self) -> bool:
        """Whether a transform undoes RoPE."""
        return any(t.needs_rope for plan in self.plans for c in plan.chains.values() for t in c.online)


class KVPackCache(Cache):
    """Keys and values of all layers, encoded as their plans say.

    Attention during a forward pass sees the pass's own tokens exactly and older ones as stored.
    Tokens are encoded once, when they leave the exact tail, and never again.

    Args:
        scheme: plans, states and rotary embeddings.
        exact_prefill: False makes the cache a measuring device (protocol "A" of the literature:
            KVQuant, RotateKV): every token that completes a token block is encoded at once, the
            exact window does not apply, and attention sees the pass's own tokens as decoded, too.
            Tokens that do not fill a block, and protected ones, stay exact.

    A cache must be told of each forward pass by `begin`; `kvpack.runtime.install` adds the hooks
    that do it.
    """

    def __init__(self, scheme: KVScheme, *, exact_prefill: bool = True) -> None:
        self.scheme, self.exact_prefill = scheme, exact_prefill
        self.track = TokenTrack()
        self.reconstruction = Reconstruction(len(scheme.plans) - 1)
        layers = [self._layer(plan) for plan in scheme.plans]
        super().__init__(layers=layers)
        self.layers: list[KVPackLayer] = layers

    def _layer(self, plan: KVLayerPlan) -> KVPackLayer:
        states = {chain: self.scheme.states_of(plan, chain) for chain in plan.chains}
        if plan.inputs is not None:
            return self._inputs_layer(plan, plan.inputs, states)
        rope = self.scheme.ropes.get(plan.attention.layer)
        make: Callable[..., KVPackLayer] = KVPackLayer
        if plan.narrowed:
            make = NarrowedLayer
        elif plan.retrieval is not None:
            make = partial(RetrievalLayer, retrieval=plan.retrieval)
        elif plan.policy.scorer is not None or plan.sees_attention:
            make = RankedLayer
        return make(plan=plan, states=states, rope=rope, track=self.track, exact_prefill=self.exact_prefill)

    def _inputs_layer(
        self, plan: KVLayerPlan, inputs: InputsPlan, states: Mapping[str, tuple[State, ...]]
    ) -> KVPackLayer:
        layer = plan.attention.layer
        bases = {plane: self.scheme.states[basis_name(layer, plane)] for plane in inputs.bases}
        parts = (plan, states, bases, self.scheme.remakes[layer], self.track)
        if inputs.link is None:
            return InputsLayer(*parts, exact_prefill=self.exact_prefill)
        return ChainedLayer(*parts, self.reconstruction, exact_prefill=self.exact_prefill)

    def begin(self, batch: int, tokens: int, attention_mask: Tensor | None = None) -> None:
        """Announce a forward pass; `attention_mask` [B, T] covers the cached and the new tokens.

        Raises:
            UsageError: the batch changed, or the mask is too short.
        """
        self.reconstruction.clear()
        self.track.begin(self.get_seq_length(), batch, tokens, attention_mask)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.reconstruction.clear()
        self.track.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i of the batch what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        self.track.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch (integers or a bool mask)."""
        rows = torch.as_tensor(indices)
        rows = rows.nonzero().squeeze(-1) if rows.dtype == torch.bool else rows
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        if self.track.batch:
            self.reorder_cache(torch.arange(self.track.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens; see `KVPackLayer.crop`."""
        super().crop(tokens_to_remove)
        self.reconstruction.clear()
        self.track.crop(self.get_seq_length())

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Refused: the compressed cache stays on the model's device."""
        self.layers[layer_idx].offload()

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Refused, as `offload`."""
        self.layers[layer_idx].offload()

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, exact tails, protected tokens, positions and padding marks."""
        return self.track.nbytes + sum(layer.nbytes for layer in self.layers)

    @property
    def allocated_nbytes(self) -> int:
        """The same with the buffers' room to grow."""
        return self.track.nbytes + sum(layer.allocated_nbytes for layer in self.layers)

    @property
    def device_nbytes(self) -> int:
        """Of `nbytes`, those on the model's device: without what is kept on the CPU."""
        return self.track.nbytes + sum(layer.device_nbytes for layer in self.layers)

    @property
    def elements(self) -> int:
        """Numbers that an uncompressed cache would hold."""
        return sum(layer.elements for layer in self.layers)

    def bits_per_element(self) -> float:
        """Held bits divided by the numbers that an uncompressed cache would hold; 0 when empty."""
        return 8 * self.nbytes / self.elements if self.elements else 0.0

    @property
    def stored_tokens(self) -> int:
        """Tokens held in encoded form, summed over layers, keys and values counted apart."""
        return sum(sum(layer.stored_tokens.values()) for layer in self.layers)

    @property
    def encoded_tokens(self) -> int:
        """Tokens ever encoded, summed as `stored_tokens`."""
        return sum(layer.encoded_tokens for layer in self.layers)


def make_scheme(
    plans: Sequence[KVLayerPlan],
    states: Mapping[str, Tensor],
    ropes: Mapping[int, Rope] | None = None,
    remakes: Mapping[int, Rematerialiser] | None = None,
) -> KVScheme:
    """A scheme from the plans of all layers, in any order."""
    ordered = sorted(plans, key=lambda plan: plan.attention.layer)
    return KVScheme(tuple(ordered), dict(states), dict(ropes or {}), dict(remakes or {}))
