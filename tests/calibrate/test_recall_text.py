"""Sequences of the recall task as calibration text. The sequences themselves: tests/evaluate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kvpack.calibrate.data import draw, load_text
from kvpack.calibrate.identity import data_name
from kvpack.calibrate.recall_text import RecallSettings, make_sequences, read_spec, recall_samples, words_of
from kvpack.core.errors import UsageError
from kvpack.recipe.recipe import CalibrationRecipe
from tests.evaluate.test_recall import word_tokenizer

RECIPE = CalibrationRecipe("recall:64:5", samples=6, sample_tokens=32)
WORDS = words_of(word_tokenizer(), "model")


@dataclass(frozen=True)
class Words:
    """A tokenizer as calibration sees it."""

    tokenizer: Any
    prefix: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        raise AssertionError("there is no text")


TOKENIZER = Words(word_tokenizer())


def test_the_name_gives_size() -> None:
    assert read_spec("recall:1024") == RecallSettings(1024)
    assert read_spec("recall:256:4") == RecallSettings(256, 4)


@pytest.mark.parametrize("spec", ["recall:", "recall:x", "recall:64:", "recall:64:3:2", "recall:-1"])
def test_another_name_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="cannot read") as caught:
        draw(replace(RECIPE, data=spec), TOKENIZER)
    assert "recall:1024" in caught.value.hint


def test_samples_of_a_sequence_each() -> None:
    settings = RecallSettings(48, 4)
    found = recall_samples(settings, WORDS, 5, 48, seed=2)
    assert torch.equal(found, make_sequences(replace(settings, sequences=5, seed=-3), WORDS))


@pytest.mark.parametrize(("samples", "tokens"), [(1, 8), (6, 32), (3, 100), (2, 64)])
def test_sequences_are_joined_and_cut(samples: int, tokens: int) -> None:
    settings = RecallSettings(64, 5)
    found = recall_samples(settings, WORDS, samples, tokens, seed=0)
    assert found.shape == (samples, tokens)
    assert found.dtype == torch.int64
    assert (found[:, 0] == WORDS.start).all()
    assert not (found[:, 1:] == WORDS.start).any()
    joined = make_sequences(replace(settings, sequences=20, seed=-1), WORDS)[:, 1:].flatten()
    assert torch.equal(found[:, 1:].flatten(), joined[: samples * (tokens - 1)])


def test_the_recipe_decides() -> None:
    one, other = draw(RECIPE, TOKENIZER), draw(replace(RECIPE, seed=1), TOKENIZER)
    assert one.data == data_name(RECIPE.data) == "recall:64:5"
    assert one.tokens.shape == (6, 32)
    assert one.tokens_sha256 == draw(RECIPE, TOKENIZER).tokens_sha256 != other.tokens_sha256
    assert one.data_sha256 != other.data_sha256


@pytest.mark.parametrize("seed", [0, 1, -1])
def test_what_is_asked_was_never_seen(seed: int) -> None:
    seen = recall_samples(RecallSettings(64, 5), WORDS, 4, 64, seed)
    for asked in range(3):
        rows = make_sequences(RecallSettings(64, 5, sequences=4, seed=asked), WORDS)
        assert not (seen[:, None] == rows[None]).all(-1).any()


@pytest.mark.parametrize(("spec", "message"), [("recall:35:5", "too few"), ("recall:200:8", "cannot ask")])
def test_what_does_not_fit_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(replace(RECIPE, data=spec), TOKENIZER)


def test_it_is_no_text_to_score() -> None:
    with pytest.raises(UsageError, match="for calibration only") as caught:
        load_text("recall:64")
    assert "--task recall" in caught.value.hint
