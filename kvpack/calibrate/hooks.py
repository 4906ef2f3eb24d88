"""Running a model one decoder block at a time, exactly as its own forward would.

The model's forward prepares masks, positions and rotary embeddings in its own way. It is run once
with decoder blocks that only record what they are given; each block can then be called alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvpack.core.errors import UnsupportedModel
from kvpack.core.roles import Codec, Transform
from kvpack.core.weight_code import prepare_input
from kvpack.models.attention_interface import watch
from kvpack.models.view import ModelView
from kvpack.recipe.plan import WeightPlan

if TYPE_CHECKING:
    from torch import Tensor, nn

OnUpdate = Callable[["Tensor", "Tensor"], None]
OnQueries = Callable[["Tensor"], None]


class Tap(Cache):
    """A cache that stores nothing and shows every update's keys (after RoPE) and values."""

    def __init__(self, seen: OnUpdate | None = None) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Show the update and hand it back."""
        if self._seen is not None:
            self._seen(key_states, value_states)
        return key_states, value_states


@dataclass(frozen=True)
class Recording:
    """What one forward gave its decoder blocks.

    `hidden` [B, T, C] enters block 0; `arguments` are the keyword arguments of every block, in
    which `tap` stands for the cache.
    """

    hidden: Tensor
    arguments: tuple[dict[str, Any], ...]
    tap: Tap


def record(view: ModelView, tokens: Tensor) -> Recording:
    """Embed `tokens` [B, T] and record what every block is given. Needs the outer tensors."""
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []
    tap = Tap()

    def keep(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise UnsupportedModel(
                f"{view.spec.architecture} passes arguments to its decoder blocks by position",
                why="they cannot be told apart",
            )
        hidden.append(x)
        arguments.append(kwargs)
        return x

    with _replaced(view.blocks, [keep] * len(view.blocks)):
        view.base(input_ids=tokens, past_key_values=tap, use_cache=True)
    return Recording(hidden[0], tuple(arguments), tap)


def run_block(
    view: ModelView,
    layer: int,
    hidden: Tensor,
    recording: Recording,
    seen: OnUpdate | None = None,
) -> Tensor:
    """Run one loaded block on `hidden` [B, T, C] with recorded arguments.

    Args:
        view: the model; the block's tensors are loaded.
        layer: which block.
        hidden: its input; B and T as in the recording.
        recording: what the model gives its blocks.
        seen: called with the layer's keys (after RoPE) and values [B, K, T, D].

    Raises:
        UnsupportedModel: the block returns something else than hidden states.
    """
    given = recording.arguments[layer]
    tap = Tap(seen)
    given = {name: tap if value is recording.tap else value for name, value in given.items()}
    result = view.blocks[layer](hidden, **given)
    if not isinstance(result, torch.Tensor):
        raise UnsupportedModel(
            f"decoder block returns a {type(result).__name__}, not hidden states",
            where=view.spec.blocks[layer],
        )
    return result


@contextmanager
def watched(view: ModelView, layer: int, queries: OnQueries | None) -> Iterator[None]:
    """Show the queries (after RoPE) [B, H, T, D] of a layer; with None nothing is watched.

    `observe` must have been called on the model before the recording.
    """
    if queries is None:
        yield
        return

    def show(query: Tensor, *rest: Any) -> None:
        queries(query)

    with watch(view.attention(layer), show):
        yield


def turned(view: ModelView, weights: Mapping[str, WeightPlan]) -> AbstractContextManager[None]:
    """Give packed layers, by path, their input in their own basis."""
    online = {name: (weight.online, None) for name, weight in weights.items() if weight.online}
    return _prepared(view, online)


def coded(view: ModelView, weights: Mapping[str, WeightPlan]) -> AbstractContextManager[None]:
    """Approximate what packed layers, by path, are given as the artifact does; inside `turned`."""
    return _prepared(view, {n: ((), w.inputs) for n, w in weights.items() if w.inputs is not None})


@contextmanager
def _prepared(
    view: ModelView, how: Mapping[str, tuple[tuple[Transform, ...], Codec | None]]
) -> Iterator[None]:
    with ExitStack() as stack:
        for name, (transforms, inputs) in how.items():
            prepare = partial(_prepare, transforms, inputs)
            stack.callback(view.module(name).register_forward_pre_hook(prepare).remove)
        yield


def _prepare(
    transforms: tuple[Transform, ...], inputs: Codec | None, module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (prepare_input(args[0], transforms, inputs), *args[1:])


def finish(view: ModelView, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Hidden states after the last block [B, T, C] -> what enters the head. Needs the outer tensors."""
    with _replaced(view.blocks, _passing(view, hidden)):
        result: Tensor = view.base(input_ids=tokens, use_cache=False).last_hidden_state
    return result


def logits(view: ModelView, hidden: Tensor) -> Tensor:
    """Hidden states after the last block [B, T, C] -> logits [B, T, V], as the model makes them.

    Needs `ModelView.head_tensors`. Tokens do not see each other, so any piece of a text will do.
    """
    with _replaced(view.blocks, _passing(view, hidden)):
        result: Tensor = view.model(inputs_embeds=hidden, use_cache=False).logits
    return result


def _passing(view: ModelView, hidden: Tensor) -> list[Callable[..., Tensor]]:
    """Forwards for all blocks, of which the last gives `hidden`."""

    def pass_on(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def substitute(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    return [pass_on] * (len(view.blocks) - 1) + [substitute]


@contextmanager
def _replaced(blocks: list[nn.Module], forwards: list[Callable[..., Tensor]]) -> Iterator[None]:
    """Give every block another forward, for a while."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.__dict__["forward"] = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]
