"""Tiny models, plans for them, and a slow dense cache to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from kvpack.core.model_spec import AttentionSpec
from kvpack.core.roles import Codec, TierPolicy, Transform
from kvpack.core.types import Group
from kvpack.models.attention import describe_attention
from kvpack.models.skeleton import decoder_blocks
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.parts.transforms.channel_reorder import ChannelReorder
from kvpack.parts.transforms.hadamard import Hadamard
from kvpack.parts.transforms.unrope import Unrope
from kvpack.recipe.kv_plan import KVLayerPlan, state_name
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.runtime.install import install

WINDOW = 16

SHAPES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}

FAMILY_SHAPES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "num_hidden_layers": 3},
    "gemma3_text": {"sliding_window": WINDOW, "num_hidden_layers": 3, "sliding_window_pattern": 2},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None, "rotary_pct": 0.25},
    "phi3": {"head_dim": None},
}


def tiny(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    """A random model in memory, with weights large enough that attention matters."""
    settings = {**SHAPES, **FAMILY_SHAPES.get(family, {}), **overrides}
    config = AutoConfig.for_model(family, **{k: v for k, v in settings.items() if v is not None})
    config.eos_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def attention_of(model: Any) -> list[AttentionSpec]:
    name, blocks = decoder_blocks(model)
    return list(describe_attention(model, model.config, tuple(f"{name}.{i}" for i in range(len(blocks)))))


def per_channel(bits: int = 2, size: int = 8) -> Affine:
    """KIVI's key quantiser; float32 scales keep the reference simple."""
    return Affine(bits=bits, group=Group("token", size), scale_dtype="float32")


def per_token(bits: int = 2, size: int = 8) -> Affine:
    return Affine(bits=bits, group=Group("channel", size), scale_dtype="float32")


@dataclass(frozen=True)
class Scheme:
    """What the layers of a model get; `perm` asks for a random channel order."""

    key: Codec = field(default_factory=per_channel)
    value: Codec = field(default_factory=per_token)
    policy: TierPolicy = field(default_factory=lambda: SinkRecent(recent_tokens=16))
    key_transforms: tuple[Transform, ...] = ()

    def plans(self, model: Any) -> list[KVLayerPlan]:
        plans = []
        for spec in attention_of(model):
            shape: tuple[int, ...] = (1, spec.kv_heads, self.key.token_block, spec.head_dim)
            states = []
            for transform in self.key_transforms:
                states.append(transform.state_spec(shape))
                shape = transform.shape(shape)
            key = PlanePlan(self.key_transforms, False, (self.key,), (*states, {}))
            plans.append(KVLayerPlan(spec, key, PlanePlan((), False, (self.value,), ({},)), self.policy))
        return plans

    def states(self, model: Any) -> dict[str, Tensor]:
        states = {}
        for plan in self.plans(model):
            generator = torch.Generator().manual_seed(plan.attention.layer)
            for i, specs in enumerate(plan.key.states):
                for name, spec in specs.items():
                    perm = torch.randperm(spec.elements, generator=generator).to(torch.int32)
                    states[state_name(plan.attention.layer, "key", i, name)] = perm.reshape(spec.shape)
        return states

    def install(self, model: Any) -> Any:
        install(model, self.plans(model), self.states(model))
        return model


KIVI = Scheme()
ROTATE = Scheme(
    key=per_token(4, 16),
    value=per_token(4, 8),
    policy=SinkRecent(sink_tokens=2, recent_tokens=0),
    key_transforms=(Unrope(), Hadamard(heads=4), ChannelReorder()),
)


def fake_quantise(x: Tensor, bits: int, dim: int) -> Tensor:
    """One float scale and minimum for all of `x` along `dim`; written out, shares no code."""
    low, high = x.min(dim, keepdim=True).values, x.max(dim, keepdim=True).values
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.round((x - low) / scale) * scale + low


Quantise = Callable[[Tensor, int], Tensor]
"""Fake-quantises tokens [B, K, n, D] whose first is slot `int`."""


class ReferenceLayer(DynamicLayer):
    """KIVI's schedule on dense tensors: keys flushed `window` at a time, values one by one."""

    def __init__(
        self,
        key: Quantise,
        value: Quantise,
        *,
        key_window: int,
        key_block: int,
        value_window: int,
        sinks: int = 0,
        sliding: int | None = None,
    ) -> None:
        super().__init__()
        self.quantise = {"key": key, "value": value}
        self.key_window, self.key_block, self.value_window = key_window, key_block, value_window
        self.done = {"key": 0, "value": 0}
        self.sinks, self.sliding = sinks, sliding
        self.is_sliding = sliding is not None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        out = keys.clone(), values.clone()
        end = keys.shape[2]
        self.keys, self.values = keys.clone(), values.clone()
        while end - self.done["key"] >= self.key_window and self.key_block > 1:
            for _ in range(self.key_window // self.key_block):
                self._replace("key", self.keys, self.key_block)
        while self.key_block == 1 and end - self.done["key"] > self.key_window:
            self._replace("key", self.keys, 1)
        while end - self.done["value"] > self.value_window:
            self._replace("value", self.values, 1)
        if self.sliding is None:
            return out
        visible = self.sliding - 1 + key_states.shape[2]
        return out[0][:, :, -visible:], out[1][:, :, -visible:]

    def _replace(self, plane: str, held: Tensor, tokens: int) -> None:
        start = self.done[plane]
        exact = held[:, :, start : start + tokens].clone()
        coded = self.quantise[plane](exact, start)
        for i in range(tokens):
            if start + i >= self.sinks:
                held[:, :, start + i] = coded[:, :, i]
        self.done[plane] += tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self.get_seq_length()
        start = 0 if self.sliding is None else max(0, past - self.sliding + 1)
        return past - start + query_length, start


def kivi_reference(model: Any, *, window: int = 16, block: int = 8, bits: int = 2) -> Cache:
    def key(x: Tensor, start: int) -> Tensor:
        return fake_quantise(x, bits, 2)

    def value(x: Tensor, start: int) -> Tensor:
        groups = [fake_quantise(part, bits, -1) for part in x.split(8, -1)]
        return torch.cat(groups, -1)

    return Cache(
        layers=[
            ReferenceLayer(
                key, value, key_window=window, key_block=block, value_window=window, sliding=spec.window
            )
            for spec in attention_of(model)
        ]
    )


def hadamard_matrix(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / n**0.5


def rotate_reference(model: Any, states: dict[str, Tensor], *, sinks: int = 2) -> Cache:
    """Un-RoPE, rotate groups of heads, permute, quantise per token, and all of it backwards."""
    base = model.config.rope_parameters["rope_theta"]

    def layer(spec: AttentionSpec) -> ReferenceLayer:
        heads, channels = spec.kv_heads, spec.head_dim
        merged = max(g for g in range(1, 5) if heads % g == 0)
        h = hadamard_matrix(merged * channels)
        perm = states[state_name(spec.layer, "key", 2, "perm")].flatten().long()
        angle = base ** (-torch.arange(0, channels, 2) / channels)

        def turn(x: Tensor, slot: int, sign: int) -> Tensor:
            pair = torch.complex(x[..., : channels // 2], x[..., channels // 2 :])
            pair = pair * torch.polar(torch.ones_like(angle), sign * slot * angle)
            return torch.cat((pair.real, pair.imag), -1)

        def key(x: Tensor, start: int) -> Tensor:
            z = turn(x[:, :, 0], start, -1).reshape(len(x), -1, merged * channels) @ h
            z = z.reshape(len(x), -1)[:, perm]
            z = torch.cat([fake_quantise(part, 4, -1) for part in z.split(16, -1)], -1)
            back = torch.zeros_like(z)
            back[:, perm] = z
            back = (back.reshape(len(x), -1, merged * channels) @ h).reshape(len(x), heads, channels)
            return turn(back, start, 1).unsqueeze(2)

        def value(x: Tensor, start: int) -> Tensor:
            return torch.cat([fake_quantise(part, 4, -1) for part in x.split(8, -1)], -1)

        return ReferenceLayer(
            key, value, key_window=0, key_block=1, value_window=0, sinks=sinks, sliding=spec.window
        )

    return Cache(layers=[layer(spec) for spec in attention_of(model)])


def text(tokens: int, *, batch: int = 1, seed: int = 0, vocab: int = 64) -> Tensor:
    return torch.randint(3, vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any, steps: list[int] | None = None, **kwargs: Any) -> Tensor:
    """Logits [B, T, V] of `ids` fed in pieces of `steps` tokens (default: all, then nothing)."""
    pieces = ids.split(steps or [ids.shape[1]], dim=1)
    return torch.cat([model(p, past_key_values=cache, use_cache=True, **kwargs).logits for p in pieces], 1)
