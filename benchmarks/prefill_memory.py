"""Peak memory of a prompt given in one piece: schemes that look at attention beside those that do not.

Writes a small Llama with random weights, then gives it one prompt in a fresh process per recipe
and reports that process's peak resident memory, and how much more it is than for the plain cache:

    python benchmarks/prefill_memory.py --output docs/results/prefill_memory.md

One matrix of attention probabilities of one layer is H x T x T floats; no scheme may hold one.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny_models import make_tokenizer

MIB = 2**20
HEADS = 8

MEASURE = """
import sys, torch
from kvpack.core.memory import peak_memory_bytes
path, tokens, packed = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "packed"
if packed:
    import kvpack
    model = kvpack.load(path)
else:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
ids = torch.randint(3, 250, (1, tokens), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    model(ids[:, :8], use_cache=True, logits_to_keep=1)
    before = peak_memory_bytes()
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
held = cache.nbytes if packed else sum(t.nbytes for l in cache.layers for t in (l.keys, l.values))
print("RESULT", before, peak_memory_bytes(), held)
"""


@dataclass(frozen=True)
class Run:
    """One prompt: peak resident memory before and with it, bytes of the cache after it, seconds."""

    name: str
    before: int
    peak: int
    held: int
    seconds: float


def write_source(folder: Path, tokens: int) -> None:
    """Write the checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=256,
        max_position_embeddings=2 * tokens,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def measure(name: str, path: Path, tokens: int) -> Run:
    """One prompt in a fresh process."""
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(path),
        str(tokens),
        "plain" if name == "plain" else "packed",
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    before, peak, held = map(int, line.split()[1:])
    return Run(name, before, peak, held, time.perf_counter() - start)


def report(runs: list[Run], tokens: int) -> str:
    """A Markdown table."""
    matrix = HEADS * tokens**2 * 4
    plain = runs[0].peak - runs[0].before
    lines = [
        "# Peak memory of a prompt given in one piece",
        "",
        f"Command: `python benchmarks/prefill_memory.py --tokens {tokens}`. "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.get_num_threads()} threads.",
        "",
        f"Llama with 4 layers, {HEADS} heads of 64 channels, 2 kv heads, bfloat16; {tokens} tokens. Growth "
        "is the process's peak resident memory after the prompt minus that before it.",
        "",
        f"The attention probabilities of one layer would be {matrix / MIB:.0f} MiB in float32.",
        "",
        "| recipe | growth | beyond the plain cache | cache afterwards | seconds |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {(r.peak - r.before) / MIB:.0f} MiB | {(r.peak - r.before - plain) / MIB:+.0f} MiB | "
        f"{r.held / MIB:.1f} MiB | {r.seconds:.0f} |"
        for r in runs
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the measurements and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--recipes", nargs="+", default=["kivi", "zipcache", "mikv"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    from kvpack import pipeline

    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        write_source(source, arguments.tokens)
        runs.append(measure("plain", source, arguments.tokens))
        for name in arguments.recipes:
            out = Path(scratch, name.replace("@", "-"))
            pipeline.export(pipeline.make_plan(source, name, ()), out)
            runs.append(measure(name, out, arguments.tokens))
            print(runs[-1], file=sys.stderr)
    text = report(runs, arguments.tokens)
    if arguments.output:
        arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
