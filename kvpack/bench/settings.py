"""How long, how often and with what a benchmark measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvpack.core.errors import UsageError

FILLS = ("auto", "model", "random")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_CONTEXTS = (512, 4096)
DEFAULT_PROMPT = 512
_UNLIMITED = 1 << 62
MODEL_TOKENS = 2048
"""Contexts up to this are filled by the model, longer ones with random keys and values, where that works."""
WARM_UP = 2
"""Steps at each context that do not count: the first may compile kernels."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        contexts: tokens in the cache when steps are measured; none stands for the default ones.
        prompt_tokens: of the prompt whose prefill is measured; 0 stands for the default.
        new_tokens: generated after it.
        repeat: rounds of every measurement; a round is one turn of every column.
        steps: steps per round at each context.
        threads: of the computation; torch's own choice when None.
        dtype: of the computation, "auto" for each model's own.
        fill: who fills contexts: "model", "random", or "auto", see `MODEL_TOKENS`.
        seed: of tokens, keys and values.
        cold: load with the models' files not in memory.
    """

    contexts: tuple[int, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 32
    repeat: int = 5
    steps: int = 8
    threads: int | None = None
    dtype: str = "auto"
    fill: str = "auto"
    seed: int = 0
    cold: bool = False

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise UsageError(f"--fill cannot be {self.fill!r}", hint=f"use {', '.join(FILLS)}")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype cannot be {self.dtype!r}", hint=f"use {', '.join(DTYPES)}")

    @property
    def all_steps(self) -> int:
        """Steps at each context, those of the warm-up included."""
        return WARM_UP + self.repeat * self.steps

    def fitted(self, positions: int) -> Settings:
        """With the defaults where nothing was chosen, as far as a model with `positions` has room; 0: any."""
        room = positions or _UNLIMITED
        contexts = tuple(n for n in DEFAULT_CONTEXTS if n + self.all_steps <= room)
        shortest = (max(room // 2, 1),)
        prompt = max(min(DEFAULT_PROMPT, room - self.new_tokens), 1)
        return replace(
            self,
            contexts=self.contexts or contexts or shortest,
            prompt_tokens=self.prompt_tokens or prompt,
        )

    def filled_by(self, context: int) -> str:
        """What a worker is asked to fill a context with: "model", "random", or "auto" for what it can."""
        if self.fill == "auto":
            return "model" if context <= MODEL_TOKENS else "auto"
        return self.fill


def contexts_of(texts: Sequence[str]) -> tuple[int, ...]:
    """``["512,4096", "16384"]`` -> (512, 4096, 16384), in order, each once.

    Raises:
        UsageError: one is no positive number.
    """
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"cannot read the contexts {', '.join(texts)!r}", hint="write for example 512,4096")
    return tuple(sorted({int(word) for word in words}))
