"""`kvpack generate`: try a prompt with the packed model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli.options import Artifact, TrustRemoteCode
from kvpack.cli.run import Result, Session
from kvpack.report import human_bytes


def generate(
    session: Session,
    path: Artifact,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of --sample.")] = 0,
    stats: Annotated[bool, typer.Option("--stats", help="Also print the size of the cache.")] = False,
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
        trust_remote_code=trust_remote_code,
    )
    lines = [made.text]
    if stats and made.kv_bytes is not None:
        bits = f"{made.kv_bits_per_element:.2f} bits per element"
        lines += ["", f"{made.tokens} tokens; KV cache {human_bytes(made.kv_bytes)}, {bits}"]
    return Result(made, tuple(lines))
