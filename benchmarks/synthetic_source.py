"""A Llama checkpoint of a stated shape with random weights, for benchmarks that export it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.tiny_models import make_tokenizer


@dataclass(frozen=True)
class Shape:
    """A synthetic model and its calibration."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    samples: int
    tokens: int

    @property
    def label(self) -> str:
        """As a table heads it."""
        return f"{self.layers} layers, {self.samples} x {self.tokens} tokens"


def write_source(folder: Path, shape: Shape) -> int:
    """Write a sharded checkpoint, one shard per layer; returns its bytes."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(2048, shape.tokens),
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for i in range(shape.layers):
        _save(folder, f"model-{i:05d}.safetensors", _layer(shape, i), weight_map)
    random = _random(shape.layers)
    outside = {
        "model.embed_tokens.weight": random(shape.vocabulary, shape.hidden),
        "lm_head.weight": random(shape.vocabulary, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    _save(folder, "model-outside.safetensors", outside, weight_map)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _random(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()


def _layer(shape: Shape, i: int) -> dict[str, torch.Tensor]:
    random, hidden, ffn = _random(i), shape.hidden, shape.ffn
    narrow = hidden // shape.heads * shape.kv_heads
    tensors = {
        "self_attn.q_proj.weight": random(hidden, hidden),
        "self_attn.k_proj.weight": random(narrow, hidden),
        "self_attn.v_proj.weight": random(narrow, hidden),
        "self_attn.o_proj.weight": random(hidden, hidden),
        "mlp.gate_proj.weight": random(ffn, hidden),
        "mlp.up_proj.weight": random(ffn, hidden),
        "mlp.down_proj.weight": random(hidden, ffn),
        "input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    return {f"model.layers.{i}.{name}": tensor for name, tensor in tensors.items()}


def _save(folder: Path, name: str, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, name))
