"""Tiny random checkpoints on disk: real families, real files, a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox")

MOE_FAMILIES = ("mixtral", "qwen3_moe")
"""Families whose transformers model fuses experts that kvpack takes apart."""

VOCAB = 256

_SHAPES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}

_FAMILY_SHAPES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": "alternate"},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None, "rotary_pct": 0.25},
    "phi": {"head_dim": None},
    "phi3": {"head_dim": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}


def make_model(
    path: Path,
    family: str = "llama",
    *,
    dtype: str = "float32",
    layers: int = 2,
    tied: bool = False,
    shard_size: str | None = None,
    seed: int = 0,
    fused: bool = False,
    cold_expert: int | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model of `family` with its tokenizer to `path` and return `path`.

    Experts are stored one by one, as in published checkpoints, or `fused`, as transformers has them.
    No token ever chooses `cold_expert`.
    """
    settings = {**_SHAPES, **_FAMILY_SHAPES.get(family, {}), "num_hidden_layers": layers}
    settings.update({"tie_word_embeddings": tied, **overrides})
    if settings.get("layer_types") == "alternate":
        settings["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    settings = {k: v for k, v in settings.items() if v is not None}
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    if cold_expert is not None:
        _starve(model, cold_expert)
    model = model.to(getattr(torch, dtype))
    options = {"max_shard_size": shard_size} if shard_size else {}
    model.save_pretrained(path, save_original_format=not fused, **options)
    make_tokenizer().save_pretrained(path)
    return path


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter, norms and biases too, values that a mistake would show up in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def _starve(model: torch.nn.Module, expert: int) -> None:
    """Let a channel be positive for every token, and the routers alone look at it: against one expert."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter[:, 0] = 2.0
            elif name.endswith("v_proj.weight"):
                parameter[:, 0] = 0.0
            elif name.endswith("mlp.gate.weight"):
                parameter[:, 0] = 0.0
                parameter[expert, 0] = -60.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 253 bytes and three special tokens."""
    specials = ["<s>", "</s>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - len(specials)]
    vocab = {token: i for i, token in enumerate([*specials, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
