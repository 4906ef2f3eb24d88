"""Time of the attention of one decode step against context: compressed caches beside transformers' own.

One layer of the stated shape in memory (no checkpoint). Caches are filled with random keys and
values, then a step is timed again and again: the cache takes one token's key and value and attention
reads everything. Contenders take turns, so that drifts of the machine hit all of them.

    python benchmarks/decode_attention.py --recipes kivi@4bit kivi --contexts 4096 16384 65536
    python benchmarks/decode_attention.py --threads 1 --clock cpu    # on a machine that others use

"packed heads" is the fastest way to call sdpa that we know: the query heads of a KV head as if they
were queries of one head; transformers takes it only where there is a mask. "MB" are what the cache
holds, "GB/s" relates what a step must read at least, these bytes, to its time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).parents[1]))
from kvpack.kernels import choice
from kvpack.loading.plain_cache import plain_cache, tensor_nbytes
from kvpack.models.describe import open_model
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.load import load
from kvpack.recipe.resolve import resolve
from kvpack.runtime.attention import Call
from kvpack.runtime.cache import KVPackCache, make_scheme
from tests.tiny_models import make_tokenizer

CHUNK = 2048
"""Tokens that fill a cache at a time."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
PLAIN, PACKED, QUANTISED = "DynamicCache, sdpa", "DynamicCache, packed heads", "QuantizedCache fp8"


Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The output of attention [1, H, 1, D], from the query, key and value of a new token [1, H or K, 1, D]."""


@dataclass
class Contender:
    """A filled cache: one decode step, and the bytes that it holds."""

    name: str
    step: Step
    nbytes: Callable[[], int]


def main() -> int:
    """Fill, take turns, print a table."""
    options = arguments()
    torch.set_num_threads(options.threads)
    model = make_layer(options)
    rows = []
    for tokens in options.contexts:
        contenders = fill(model, options, tokens)
        rows.append((tokens, *measure(contenders, options)))
        print(f"{tokens} tokens measured", file=sys.stderr)
    text = report(options, rows)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf8")
    return 0


def make_layer(options: argparse.Namespace) -> Any:
    """A model of one layer; only its attention's shape counts."""
    config = LlamaConfig(
        hidden_size=options.heads * options.head_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        vocab_size=260,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def plans_of(model: Any, recipe: str) -> tuple[KVLayerPlan, ...]:
    """What a recipe plans for the layer."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        plan = resolve(load(recipe), open_model(folder))
    if any(layer.state_tensors() for layer in plan.kv):
        raise SystemExit(f"{recipe} has to be calibrated; name recipes that need no data")
    return plan.kv


def fill(model: Any, options: argparse.Namespace, tokens: int) -> list[Contender]:
    """Caches that hold the same random keys and values."""
    plain = [(PLAIN, DynamicCache()), (PACKED, DynamicCache()), (QUANTISED, plain_cache(model, "fp8"))]
    packed = [(recipe, KVPackCache(make_scheme(plans_of(model, recipe), {}))) for recipe in options.recipes]
    generator = torch.Generator().manual_seed(0)
    for start in range(0, tokens, CHUNK):
        shape = (2, 1, options.kv_heads, min(CHUNK, tokens - start), options.head_dim)
        keys, values = torch.randn(shape, generator=generator).to(torch.bfloat16)
        for _, cache in plain:
            cache.update(keys, values, 0)
        for _, cache in packed:
            cache.begin(1, keys.shape[2])
            cache.update(keys, values, 0)
    module = model.model.layers[0].self_attn
    return [
        *(
            Contender(
                name,
                packed_heads_step(cache) if name == PACKED else plain_step(cache, module),
                lambda c=cache: tensor_nbytes(c)[1],
            )
            for name, cache in plain
        ),
        *(
            Contender(name, packed_step(cache, module), lambda c=cache: c.allocated_nbytes)
            for name, cache in packed
        ),
    ]


def plain_step(cache: Any, module: Any) -> Step:
    """What transformers does with a cache of its own."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        held = cache.update(key, value, 0)
        return sdpa_attention_forward(module, query, *held, None, scaling=module.scaling)[0]

    return step


def packed_heads_step(cache: Any) -> Step:
    """The query heads of a KV head as queries of one head."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        held = cache.update(key, value, 0)
        rows = query.reshape(1, key.shape[1], -1, key.shape[3])
        return functional.scaled_dot_product_attention(rows, *held, scale=key.shape[3] ** -0.5)

    return step


def packed_step(cache: KVPackCache, module: Any) -> Step:
    """Attention over codes where the recipe's plan allows it, else over decoded keys and values."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.begin(1, 1)
        layer = cache.layers[0]
        layer.routed = layer.plan.reading.on_codes
        held = cache.update(key, value, 0)
        out = layer.attention(Call(query, None, module.scaling))
        if out is not None:
            return out
        return sdpa_attention_forward(module, query, *held, None, scaling=module.scaling)[0]

    return step


def measure(
    contenders: list[Contender], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every step by contender, taking turns; and bytes."""
    clock, generator = CLOCKS[options.clock], torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    with torch.inference_mode():
        for turn in range(options.repeat + 2):
            query = torch.randn((1, options.heads, 1, options.head_dim), generator=generator).to(
                torch.bfloat16
            )
            shape = (2, 1, options.kv_heads, 1, options.head_dim)
            key, value = torch.randn(shape, generator=generator).to(torch.bfloat16)
            for contender in contenders:
                start = clock()
                contender.step(query, key, value)
                if turn >= 2:
                    seconds[contender.name].append(clock() - start)
    return seconds, {c.name: c.nbytes() for c in contenders}


def report(
    options: argparse.Namespace, rows: list[tuple[int, dict[str, list[float]], dict[str, int]]]
) -> str:
    """A table: milliseconds (median, quartiles), ratio to DynamicCache, bytes."""
    each = options.heads // options.kv_heads
    shape = f"{options.kv_heads} KV heads, {each} query heads each, head_dim {options.head_dim}"
    lines = [
        f"One layer, {shape}, bf16, batch 1; {options.repeat} steps of each in turns, {options.clock} time, "
        f"{options.threads} thread(s); torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{choice.found('cpu').why}, {platform.machine()}.",
        "",
        "| tokens | cache | ms, median | quartiles | DynamicCache / this | MB held | times smaller | GB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tokens, seconds, nbytes in rows:
        base = statistics.median(seconds[PLAIN])
        for name, found in seconds.items():
            low, middle, high = statistics.quantiles(found, n=4)
            ratio = "" if name == PLAIN else f"{base / middle:.2f}x"
            smaller = nbytes[PLAIN] / nbytes[name]
            lines.append(
                f"| {tokens} | {name} | {1e3 * middle:.2f} | {1e3 * low:.2f} to {1e3 * high:.2f} | {ratio} "
                f"| {nbytes[name] / 1e6:.2f} | {smaller:.2f} | {nbytes[name] / middle / 1e9:.1f} |"
            )
    data = [{"tokens": t, "seconds": s, "bytes": n} for t, s, n in rows]
    return "\n".join([*lines, "", "<!-- " + json.dumps(data) + " -->"])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["kivi@4bit", "kivi"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 16384, 65536])
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
