"""One prompt through a packed model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kvpack.core.errors import UsageError
from kvpack.loading.load import load, load_tokenizer
from kvpack.loading.residency import Residency
from kvpack.recipe.sparsity import Activity
from kvpack.runtime.cache import KVPackCache
from kvpack.runtime.sparsity import SWITCH, sparsity_of


@dataclass(frozen=True)
class Generated:
    """A continued prompt.

    `text` is prompt and continuation, `tokens` their number. `kv_bytes` and `kv_bits_per_element`
    are those of the compressed cache at the end; None without a KV scheme. `residency` tells what
    stayed packed in memory; None where nothing was asked for. `activity` tells by module what sparse
    activations kept.
    """

    text: str
    tokens: int
    kv_bytes: int | None
    kv_bits_per_element: float | None
    residency: Residency | None = None
    activity: Mapping[str, Activity] = field(default_factory=dict)


def generate(
    path: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sample: bool = False,
    seed: int = 0,
    max_slowdown: float | None = None,
    max_weight_bytes: int | None = None,
    trust_remote_code: bool = False,
) -> Generated:
    """Load the artifact at `path` and continue `prompt`; limits as of `kvpack.load`.

    Raises:
        ArtifactError: the artifact is damaged.
        UsageError: the prompt is empty, or the limits cannot be kept.
    """
    if not prompt:
        raise UsageError("the prompt is empty", hint="give some text with --prompt")
    model = load(
        path,
        trust_remote_code=trust_remote_code,
        max_slowdown=max_slowdown,
        max_weight_bytes=max_weight_bytes,
    )
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    made = continue_prompt(model, tokenizer, prompt, max_new_tokens=max_new_tokens, sample=sample, seed=seed)
    return replace(made, residency=getattr(model, "kvpack_residency", None))


def continue_prompt(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, sample: bool = False, seed: int = 0
) -> Generated:
    """Continue `prompt` with a loaded model, packed or not."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty", hint="give some text with --prompt")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            return_dict_in_generate=True,
            pad_token_id=model.generation_config.pad_token_id or model.generation_config.eos_token_id,
        )
    ids = output.sequences[0]
    cache = output.past_key_values
    packed = isinstance(cache, KVPackCache)
    return Generated(
        tokenizer.decode(ids, skip_special_tokens=True),
        len(ids),
        cache.nbytes if packed else None,
        cache.bits_per_element() if packed else None,
        activity=sparsity_of(model) if hasattr(model, SWITCH) else {},
    )
