"""The tokenizer of a model, reduced to what kvpack asks of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpack.core.errors import SourceError
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
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise SourceError(
            "its tokenizer cannot be loaded",
            where=str(spec.path),
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            hint="put tokenizer.json and tokenizer_config.json beside config.json",
        ) from error
    first = tokenizer("a")["input_ids"][:1]
    return TextTokenizer(tokenizer, tuple(first) if first == [tokenizer.bos_token_id] else ())
