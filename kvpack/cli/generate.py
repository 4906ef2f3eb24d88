"""`kvpack generate`: try a prompt with the packed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli.options import Artifact, MaxSlowdown, MaxWeightMemory, TrustRemoteCode, byte_count, share
from kvpack.cli.run import Result, Session
from kvpack.cli.sparsity import activity_lines
from kvpack.report import human_bytes

if TYPE_CHECKING:
    from kvpack.loading.generate import Generated
    from kvpack.loading.residency import Residency


def generate(
    session: Session,
    path: Artifact,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after this many tokens.")
    ] = 64,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens at random instead of taking the likeliest.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of --sample: equal seeds give equal text.")] = 0,
    stats: Annotated[
        bool, typer.Option("--stats", help="Also print tokens and the size of the KV cache.")
    ] = False,
    max_slowdown: MaxSlowdown = None,
    max_weight_memory: MaxWeightMemory = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Continue a prompt with the packed model and its compressed cache."""
    from kvpack.loading.generate import generate as run

    made = run(
        Path(path),
        prompt,
        max_new_tokens=max_new_tokens,
        sample=sample,
        seed=seed,
        max_slowdown=None if max_slowdown is None else share(max_slowdown),
        max_weight_bytes=None if max_weight_memory is None else byte_count(max_weight_memory),
        trust_remote_code=trust_remote_code,
    )
    lines = [made.text]
    if stats:
        lines += ["", f"{made.tokens} tokens; {_cache_text(made)}", *activity_lines(made.activity)]
    if made.residency is not None:
        lines += ["", *_residency_lines(made.residency)]
    return Result(made, tuple(lines))


def _residency_lines(found: Residency) -> list[str]:
    """What stays packed in memory, and what it costs: predicted and measured."""
    kept = found.raw_bytes - found.saved_bytes
    lines = [
        f"weights in memory: {human_bytes(kept)} instead of {human_bytes(found.raw_bytes)}; "
        f"{len(found.packed)} of {found.layers} layers stay losslessly coded"
    ]
    base, predicted, measured = found.base_seconds, found.predicted_seconds, found.measured_seconds
    if base and predicted and measured:
        lines.append(
            f"one token: {1000 * measured:.2f} ms ({measured / base - 1:+.1%}), predicted "
            f"{1000 * predicted:.2f} ms ({predicted / base - 1:+.1%}), all unpacked {1000 * base:.2f} ms"
        )
    return lines


def _cache_text(made: Generated) -> str:
    if made.kv_bytes is None:
        return "KV cache not compressed"
    return f"KV cache {human_bytes(made.kv_bytes)}, {made.kv_bits_per_element:.2f} bits per element"
