"""`kvpack generate`: try a prompt with the packed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli.options import Artifact, TrustRemoteCode
from kvpack.cli.run import Result, Session
from kvpack.report import human_bytes

if TYPE_CHECKING:
    from kvpack.loading.generate import Generated


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
    if stats:
        lines += ["", f"{made.tokens} tokens; {_cache_text(made)}"]
    return Result(made, tuple(lines))


def _cache_text(made: Generated) -> str:
    if made.kv_bytes is None:
        return "KV cache not compressed"
    return f"KV cache {human_bytes(made.kv_bytes)}, {made.kv_bits_per_element:.2f} bits per element"
