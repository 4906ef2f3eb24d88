"""Peak memory of `kvpack export` against the number of layers.

Writes synthetic Llama checkpoints with random bf16 weights (24 layers come to more than 2 GB),
exports each in a fresh process, and reports that process's peak resident memory:

    python benchmarks/export_memory.py --recipe w4@rtn --output docs/results/export_memory.md

The bound is 1 GiB plus three times the largest tensor, and 24 layers must not need more than 12.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny_models import make_tokenizer

GIB = 2**30
HIDDEN, FFN, VOCABULARY = 2048, 5632, 32000


@dataclass(frozen=True)
class Run:
    """One export: its size, its peak resident memory, its time."""

    layers: int
    source_bytes: int
    artifact_bytes: int
    peak_bytes: int
    seconds: float


def write_source(folder: Path, layers: int) -> int:
    """Write a sharded checkpoint, one shard per layer; returns its bytes."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float32) * 0.02).bfloat16()

    # Every layer gets the same numbers: memory does not depend on them, and writing is quick.
    layer = {
        "self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": random(512, HIDDEN),
        "self_attn.v_proj.weight": random(512, HIDDEN),
        "self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": random(FFN, HIDDEN),
        "mlp.up_proj.weight": random(FFN, HIDDEN),
        "mlp.down_proj.weight": random(HIDDEN, FFN),
        "input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(layers):
        shard = {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
        total += _save(folder, f"model-{i:05d}.safetensors", shard, weight_map)
    outside = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    total += _save(folder, "model-outside.safetensors", outside, weight_map)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _save(folder: Path, name: str, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> int:
    save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, name))
    return sum(t.numel() * t.element_size() for t in shard.values())


def export(source: Path, out: Path, recipe: list[str], layers: int, source_bytes: int) -> Run:
    """Export in a fresh process and read its peak memory from the operating system."""
    code = (
        "import sys; sys.argv = ['kvpack', *sys.argv[1:]]\n"
        "from kvpack.cli import main\n"
        "from kvpack.core.memory import peak_memory_bytes\n"
        "try:\n    main()\n"
        "finally:\n    print('PEAK', peak_memory_bytes())\n"
    )
    command = [sys.executable, "-c", code, "export", str(source), *recipe, "-o", str(out)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"export failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")
    peak = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK"))
    size = sum(f.stat().st_size for f in out.iterdir())
    return Run(layers, source_bytes, size, peak, seconds)


def report(runs: list[Run], recipe: list[str]) -> str:
    """A Markdown table with the bound beside each measurement."""
    largest = VOCABULARY * HIDDEN * 2
    bound = GIB + 3 * largest
    lines = [
        f"# Peak memory of `kvpack export MODEL {' '.join(recipe)}`",
        "",
        f"Command: `python benchmarks/export_memory.py {' '.join(recipe)}`. "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.get_num_threads()} threads.",
        "",
        f"Bound: 1 GiB + 3 x largest tensor ({largest / 2**20:.0f} MiB) = {bound / 2**20:.0f} MiB.",
        "",
        "| layers | source | artifact | peak resident | bound | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.layers} | {r.source_bytes / 1e9:.2f} GB | {r.artifact_bytes / 1e9:.2f} GB | "
        f"{r.peak_bytes / 2**20:.0f} MiB | {'met' if r.peak_bytes <= bound else 'EXCEEDED'} | "
        f"{r.seconds:.1f} |"
        for r in runs
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the measurements and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="w4@rtn")
    parser.add_argument("--set", action="append", default=[], help="as of kvpack export")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    recipe = ["--recipe", arguments.recipe, *(word for change in arguments.set for word in ("--set", change))]
    runs = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch, "source")
            source.mkdir()
            size = write_source(source, layers)
            runs.append(export(source, Path(scratch, "out"), recipe, layers, size))
            print(runs[-1], file=sys.stderr)
    text = report(runs, recipe)
    if arguments.output:
        arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
