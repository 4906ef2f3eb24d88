"""Shapes of well-known models, to be filled with random numbers where no download is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kvpack.core.errors import UsageError
from kvpack.core.types import TensorSpec

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Shape:
    """A dense decoder: sizes alone. `normed` heads have a norm over queries and keys, as Qwen3's do."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    rope_theta: float
    positions: int
    normed: bool = False

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.family]
        return {
            "architectures": [architecture],
            "model_type": self.family,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-6 if self.normed else 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "dtype": DTYPE,
        }

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of the checkpoint, in its order."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{name}.weight": s for name, s in self._block()}
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocab, self.hidden)
        return {name: TensorSpec(shape, DTYPE) for name, shape in found.items()}

    def _block(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "input_layernorm", (self.hidden,)
        yield "self_attn.q_proj", (queries, self.hidden)
        yield "self_attn.k_proj", (keys, self.hidden)
        yield "self_attn.v_proj", (keys, self.hidden)
        yield "self_attn.o_proj", (self.hidden, queries)
        if self.normed:
            yield "self_attn.q_norm", (self.head_dim,)
            yield "self_attn.k_norm", (self.head_dim,)
        yield "post_attention_layernorm", (self.hidden,)
        yield "mlp.gate_proj", (self.ffn, self.hidden)
        yield "mlp.up_proj", (self.ffn, self.hidden)
        yield "mlp.down_proj", (self.hidden, self.ffn)

    @property
    def nbytes(self) -> int:
        """Bytes of the checkpoint's weights."""
        return sum(spec.nbytes for spec in self.tensors().values())


SHAPES = {
    "tiny": Shape("llama", 2, 64, 128, 4, 2, 16, 320, True, 10_000.0, 4096),
    "llama-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128_256, True, 500_000.0, 131_072),
    "llama-3b": Shape("llama", 28, 3072, 8192, 24, 8, 128, 128_256, True, 500_000.0, 131_072),
    "llama-8b": Shape("llama", 32, 4096, 14_336, 32, 8, 128, 128_256, False, 500_000.0, 131_072),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151_936, True, 1e6, 40_960, normed=True),
}
"""By name: Llama 3.2 1B and 3B, Llama 3.1 8B (RoPE without its scaling), Qwen3 0.6B, and one for tests."""


def shape_of(name: str, layers: int | None = None) -> Shape:
    """The shape called `name`, with another number of `layers` if that is wanted.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in SHAPES:
        raise UsageError(f"no shape is called {name!r}", hint=f"shapes: {', '.join(SHAPES)}")
    return SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)
