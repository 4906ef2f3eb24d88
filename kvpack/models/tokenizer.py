"""The tokenizer of a model, reduced to what kvpack asks of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpack.core.errors import KvpackError, SourceError
from kvpack.core.model_spec import ModelSpec


@dataclass(frozen=True)
class TextTokenizer:
    """Text -> token ids, without special tokens; `prefix` is what the model expects up front."""

    tokenizer: Any
    prefix: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        text: str = self.tokenizer.decode(ids)
        return text


def load_tokenizer(spec: ModelSpec, *, trust_remote_code: bool = False) -> TextTokenizer:
    """Load the tokenizer in the model's folder.

    Raises:
        SourceError: there is none, or it is broken.
    """
    tokenizer = open_tokenizer(spec.path, SourceError, trust_remote_code=trust_remote_code)
    first = tokenizer("a")["input_ids"][:1]
    return TextTokenizer(tokenizer, tuple(first) if first == [tokenizer.bos_token_id] else ())


def open_tokenizer(path: Path, error: type[KvpackError], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, as transformers makes it.

    Args:
        path: a model's or an artifact's folder.
        error: class of the exception, as both are opened here.
        trust_remote_code: let transformers run code from the folder.

    Raises:
        KvpackError: of class `error`; there is none, or it is broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as problem:
        raise error(
            "its tokenizer cannot be loaded",
            where=str(path),
            why=(str(problem).strip().splitlines() or [type(problem).__name__])[0],
            hint="put tokenizer.json and tokenizer_config.json beside config.json, and export again",
        ) from problem
