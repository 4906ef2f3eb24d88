"""A tokenizer for models that know no language: three special tokens and a token per byte."""

from __future__ import annotations

from typing import Any

SPECIAL = ("<s>", "</s>", "<pad>")
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def _letters() -> list[str]:
    """A character for each of the 256 bytes, as byte-level BPE writes them: GPT-2's table.

    Bytes that print stand for themselves; the others take the characters from U+0100, in order.
    """
    others = (chr(0x100 + i) for i in range(256))
    return [chr(byte) if byte in _PRINTED else next(others) for byte in range(256)]


def tokenizer_files() -> dict[str, dict[str, Any]]:
    """JSON of tokenizer.json and tokenizer_config.json, by name."""
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *_letters()))}
    model: dict[str, Any] = dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    model |= {"type": "BPE", **flags, "vocab": vocabulary, "merges": []}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(i, token) for i, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": plain,
        "post_processor": None,
        "decoder": plain,
        "model": model,
    }
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **names},
    }


def _special(number: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}
