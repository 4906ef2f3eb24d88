"""Making a model use its compressed cache by itself, through public seams only.

The model becomes an instance of a subclass of its own class that prepares the cache for
`generate()`, and two kinds of forward pre-hooks tell the cache what it has to know: one on the
base model (a fresh cache where none was passed, padding), one on decoder layers (positions, and
the hidden states where a policy looks at them).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kvpack.core.errors import UnsupportedModel, UsageError
from kvpack.core.types import Rope
from kvpack.models.attention_interface import is_routed, observable, observe, set_observer, set_reader
from kvpack.models.rematerialise import Rematerialiser
from kvpack.models.rope import rope_of
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.runtime.attention import Call
from kvpack.runtime.cache import KVPackCache, KVScheme, make_scheme
from kvpack.runtime.layer import KVPackLayer

SCHEME = "_kvpack_scheme"
"""Attribute of a model that holds its `KVScheme`."""

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], "tuple[tuple[Any, ...], dict[str, Any]] | None"]


class CompressedGeneration:
    """Mixin for a transformers model: `generate()` starts with a compressed cache."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Prepare a compressed cache unless the caller passed or named another one, or wants none."""
        chosen = model_kwargs.get("past_key_values") is not None
        named = generation_config.cache_implementation is not None
        if chosen or named or generation_config.use_cache is False:
            parent: Any = super()
            return parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = new_cache(self)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None


def new_cache(model: Any, *, exact_prefill: bool = True) -> KVPackCache:
    """A fresh compressed cache for an installed model; see `KVPackCache` for `exact_prefill`.

    Raises:
        UsageError: the model has no KV scheme.
    """
    scheme = getattr(model, SCHEME, None)
    if scheme is None:
        raise UsageError(
            f"this {type(model).__name__} has no KV-cache scheme",
            hint="load an artifact whose recipe has a kv_cache section",
        )
    return KVPackCache(scheme, exact_prefill=exact_prefill)


def install(
    model: Any,
    plans: Sequence[KVLayerPlan],
    states: Mapping[str, Tensor],
    ropes: Mapping[int, Rope] | None = None,
) -> None:
    """Make `model` use caches under `plans` wherever the caller passes none.

    A cache implementation that the model's generation config names is cleared: it would win over
    the compressed cache in every `generate()`. Callers can still name one per call.

    Args:
        model: a transformers causal model; changed in place.
        plans: one plan per attention layer.
        states: state of the online transforms, by `kvpack.recipe.kv_plan.state_name`.
        ropes: rotary embedding by layer; taken from the model where a transform needs it.

    Raises:
        UsageError: the model has a scheme already, or layers or states are missing.
        UnsupportedModel: RoPE is to be undone or applied again and the model's cannot be, or the model
            does not take `past_key_values`.
    """
    if getattr(model, SCHEME, None) is not None:
        raise UsageError("this model has a KV-cache scheme already", hint="load the artifact anew")
    taps = {
        p.attention.layer: (p.attention, p.inputs.tap == "residual") for p in plans if p.inputs is not None
    }
    remakes = {n: Rematerialiser.of(model, a, residual=residual) for n, (a, residual) in taps.items()}
    scheme = make_scheme(plans, states, remakes=remakes)
    if ropes is None and scheme.needs_rope:
        modules = {plan.attention.layer: model.get_submodule(plan.attention.module) for plan in scheme.plans}
        ropes = {layer: rope_of(model, module) for layer, module in modules.items()}
    scheme = make_scheme(plans, states, ropes, remakes)
    base = model.base_model
    names = list(inspect.signature(base.forward).parameters)
    if "past_key_values" not in names:
        raise UnsupportedModel(f"{type(base).__name__} takes no past_key_values", why="it has no KV cache")
    setattr(model, SCHEME, scheme)
    base.register_forward_pre_hook(_announce(scheme, names), with_kwargs=True)
    for index, plan in enumerate(scheme.plans):
        if index == 0 or scheme.needs_hidden:
            block = model.get_submodule(plan.attention.block)
            block.register_forward_pre_hook(_observe(plan, index == 0), with_kwargs=True)
    for layer, (attention, residual) in taps.items():
        module = model.get_submodule(attention.block if residual else attention.module)
        module.register_forward_pre_hook(_show_input(layer), with_kwargs=True)
    if _observed(model, scheme):
        for plan in scheme.plans:
            _show_attention(model.get_submodule(plan.attention.module), plan.attention.layer)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.cache_implementation = None
    model.__class__ = _subclass(type(model))


def _observed(model: Any, scheme: KVScheme) -> bool:
    """Route attention through the registry, where that is needed or where codes can then be read."""
    if scheme.sees_attention:
        observe(model)
        return True
    try:
        if scheme.on_codes and observable(model):
            observe(model)
            return True
    except UnsupportedModel:
        pass  # The family's attention reads dense keys and values, as any other does.
    return False


def _show_attention(attention: nn.Module, layer: int) -> None:
    """Let the layer of the cache that is in use see what one attention module computes."""
    in_use: list[KVPackLayer | None] = [None]

    def find(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _cache_among(args, kwargs)
        in_use[0] = None if cache is None else cache.layers[layer]
        if in_use[0] is not None:
            readable = in_use[0].plan.reading.on_codes and not module.training
            in_use[0].routed = readable and is_routed(module.config)

    def read(
        query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor | None:
        held = in_use[0]
        found = None if held is None else held.attention(Call(query, mask, scaling, softcap, sinks))
        if found is not None:
            in_use[0] = None
        return found

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        # The cache is let go at once, so that the model never keeps a finished one alive.
        held, in_use[0] = in_use[0], None
        if held is None:
            return None
        held.check_read()
        return held.attend(query, key, value, mask, scaling)

    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        held, in_use[0] = in_use[0], None
        if held is not None:
            held.check_read()

    attention.register_forward_pre_hook(find, with_kwargs=True)
    attention.register_forward_hook(check)
    set_observer(attention, attend)
    set_reader(attention, read)


def _show_input(layer: int) -> Hook:
    """Hook on an attention module or its block: shows its input to the layer of the cache that stores it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _cache_among(args, kwargs)
        if cache is not None:
            cache.layers[layer].see_input(args[0] if args else kwargs["hidden_states"])

    return hook


def _cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> KVPackCache | None:
    """The compressed cache that a module was given, None if there is none."""
    return next((v for v in (*kwargs.values(), *args) if isinstance(v, KVPackCache)), None)


def _subclass(cls: type) -> type:
    """`cls` with `CompressedGeneration`, under its own name, which transformers writes to configs."""
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (CompressedGeneration, cls), body)


def _announce(scheme: KVScheme, names: Sequence[str]) -> Hook:
    """Hook on the base model: supplies a cache where one is wanted, and tells it of the pass."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("past_key_values") is None and _wants_cache(module, given.get("use_cache")):
            given["past_key_values"] = KVPackCache(scheme)
        cache = given.get("past_key_values")
        if not isinstance(cache, KVPackCache):
            return None
        inputs = given.get("input_ids")
        inputs = given["inputs_embeds"] if inputs is None else inputs
        mask = given.get("attention_mask")
        cache.begin(inputs.shape[0], inputs.shape[1], mask if isinstance(mask, Tensor) else None)
        types = given.get("mm_token_type_ids", given.get("token_type_ids"))
        if isinstance(types, Tensor) and types.shape == inputs.shape[:2]:
            cache.track.text = types == 0
        return (), given

    return hook


def _wants_cache(module: Any, use_cache: bool | None) -> bool:
    """Whether the base model would make a cache of its own."""
    if getattr(module, "gradient_checkpointing", False) and module.training:
        return False
    return bool(module.config.use_cache if use_cache is None else use_cache)


def _observe(plan: KVLayerPlan, first: bool) -> Hook:
    """Hook on a decoder layer: tells the cache of positions (first layer only) and hidden states."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _cache_among(args, kwargs)
        if cache is None:
            return
        if first and isinstance(kwargs.get("position_ids"), Tensor):
            cache.track.locate(kwargs["position_ids"])
        scorer = plan.policy.scorer
        if first and scorer is not None and scorer.needs == "embeddings":
            cache.track.embeddings = args[0] if args else kwargs["hidden_states"]
        if plan.policy.needs_hidden:
            cache.track.hidden[plan.attention.layer] = args[0] if args else kwargs["hidden_states"]

    return hook
