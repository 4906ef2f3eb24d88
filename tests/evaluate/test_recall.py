"""The recall task: its words, its sequences, and how a compressed cache is asked."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import kvpack
from kvpack import pipeline
from kvpack.calibrate.recall_text import RecallSettings, Words, answer_positions, make_sequences, words_of
from kvpack.core.errors import UsageError
from kvpack.evaluate.gates import METRICS, RECALL_METRICS, failed_gates, parse_gates
from kvpack.evaluate.recall import _steps, evaluate_recall, prepare_recall, recall, score_recall
from kvpack.evaluate.scores import RecallEvaluation
from kvpack.runtime.install import new_cache
from tests.evaluate.conftest import IDENTITY, affine, kv_recipe
from tests.tiny_models import make_model, make_tokenizer

# "cedar" and "raven" look like fillers, but no other word begins like the one or ends like the other.
KEYS = ["cedar", "raven", "stone", "amber", "ember", "falcon", "umbrella"]
VALUES = [f"{a}{b}" for a, b in product("ABC", "0123")]
FILLERS = ["".join(x) for x in product(["ba", "ke", "ra"], ["dar", "fen", "gil"])]
TASK = RecallSettings(tokens=96, facts=4, sequences=3)


def word_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    words = [*VALUES, *KEYS, *FILLERS] if words is None else words
    marks = ["<bos>", "<pad>", ";", "?"]
    vocabulary = {name: i for i, name in enumerate([*marks, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=marks[1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = dict(zip(("bos_token", "pad_token", "eos_token"), marks[:3], strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


@pytest.fixture(scope="module")
def words() -> Words:
    return words_of(word_tokenizer(), "model")


def texts(settings: RecallSettings, words: Words) -> list[str]:
    return word_tokenizer().batch_decode(make_sequences(settings, words))


def test_words_are_told_apart_by_their_form(words: Words) -> None:
    names = word_tokenizer().convert_ids_to_tokens
    assert names(list(words.keys)) == KEYS
    assert names(list(words.values)) == VALUES
    assert sorted(names(list(words.fillers))) == sorted(FILLERS)
    assert names([words.start, words.ask, words.end]) == ["<bos>", "?", ";"]


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        ([VALUES, KEYS, FILLERS, ["Ġthe"]], "token 'Ġthe'"),
        ([KEYS, FILLERS], "0 words that can be values"),
        ([VALUES, FILLERS], "0 words that can be keys"),
        ([VALUES, KEYS], "0 words that can be fillers"),
        ([VALUES, KEYS, FILLERS[1:]], "0 words that can be fillers"),
    ],
)
def test_another_vocabulary_is_refused(lists: list[list[str]], why: str) -> None:
    tokenizer = word_tokenizer([name for names in lists for name in names])
    with pytest.raises(UsageError, match=why) as caught:
        words_of(tokenizer, "some/model")
    assert caught.value.where == "some/model"


def test_a_text_model_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="not one of the recall task"):
        words_of(make_tokenizer(), "some/model")


@pytest.mark.parametrize("questions", [None, 2, 11])
def test_a_sequence_is_facts_among_fillers_and_then_questions(words: Words, questions: int | None) -> None:
    settings = replace(TASK, questions=questions)
    for text in texts(settings, words):
        tokens = text.split()
        assert len(tokens) == 96
        assert tokens[0] == "<bos>"
        prompt, asked = tokens[: settings.prompt_tokens], tokens[settings.prompt_tokens :]
        facts = dict(re.findall(r"(\w+) ([A-C][0-3]) ;", " ".join(prompt)))
        assert len(facts) == 4
        assert set(facts) <= set(KEYS)
        rest = re.sub(r"\w+ [A-C][0-3] ;", "", " ".join(prompt[1:])).split()
        assert set(rest) <= set(FILLERS)
        assert len(rest) == settings.prompt_tokens - 1 - 3 * 4
        pairs = re.findall(r"\? (\w+) ([A-C][0-3]) ;", " ".join(asked))
        assert len(pairs) == settings.asked == (questions or 4)
        assert all(facts[key] == value for key, value in pairs)
        assert len({key for key, _ in pairs}) == min(4, settings.asked)
        assert [tokens[at] for at in answer_positions(settings)] == [value for _, value in pairs]


def test_the_seed_decides_and_more_sequences_go_on(words: Words) -> None:
    few, many = (make_sequences(replace(TASK, sequences=n), words) for n in (3, 6))
    assert torch.equal(few, many[:3])
    assert not torch.equal(many, make_sequences(replace(TASK, sequences=6, seed=1), words))
    state = torch.random.get_rng_state()
    make_sequences(TASK, words)
    assert torch.equal(state, torch.random.get_rng_state()), "no global generator"


def test_facts_may_fill_the_sequence(words: Words) -> None:
    settings = RecallSettings(tokens=1 + 3 * 7 + 4 * 7, facts=7, sequences=2)
    assert make_sequences(settings, words).shape == (2, settings.tokens)
    with pytest.raises(UsageError, match="too few") as caught:
        make_sequences(replace(settings, tokens=settings.tokens - 1), words)
    assert caught.value.hint == "they need 50"
    with pytest.raises(UsageError, match="cannot ask") as caught:
        make_sequences(RecallSettings(tokens=96, facts=8), words)
    assert "1 to 7" in caught.value.hint


@pytest.mark.parametrize("step", [1, 5, 16])
def test_questions_go_in_steps_that_end_where_blocks_do(step: int) -> None:
    ids = torch.arange(96)[None]
    parts = list(_steps(ids, 80, step))
    assert torch.equal(torch.cat(parts, 1), ids)
    assert parts[0].shape[1] == 80
    ends = torch.tensor([p[0, -1] + 1 for p in parts])
    assert all(e % step == 0 for e in ends[1:-1].tolist())
    assert max(p.shape[1] for p in parts[1:]) <= step


class Oracle(torch.nn.Module):
    """Knows every answer of the sequences it was given, but the first `wrong` of each."""

    def __init__(self, ids: torch.Tensor, settings: RecallSettings, wrong: int) -> None:
        super().__init__()
        self.ids, self.at = ids, 0
        self.answers = torch.roll(ids, -1, 1)
        for position in answer_positions(settings)[:wrong]:
            self.answers[:, position - 1] = 0

    def forward(self, step: torch.Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        start, self.at = self.at, (self.at + step.shape[1]) % self.ids.shape[1]
        part = self.answers[:, start : start + step.shape[1]]
        logits = torch.nn.functional.one_hot(part, 64).float()
        return type("Output", (), {"logits": logits})()


@pytest.mark.parametrize("protocol", ["prefill", "decode"])
@pytest.mark.parametrize("wrong", [0, 1, 4])
def test_answers_are_counted(words: Words, protocol: str, wrong: int) -> None:
    ids = make_sequences(TASK, words)
    cache = type("Cache", (), {"nbytes": 5, "elements": 10})
    oracle = Oracle(ids, TASK, wrong)
    shares, bits = recall(
        oracle, ids, TASK, new_cache=lambda exact: cache(), protocols=(protocol,), step_tokens=5
    )
    assert shares == {protocol: 1 - wrong / 4}
    assert bits == {protocol: 4}
    assert recall(oracle, ids, TASK, new_cache=None) == ({"weights": 1 - wrong / 4}, {})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that speaks the task; its answers are arbitrary, but its own."""
    path = make_model(tmp_path_factory.mktemp("recall") / "source", vocab_size=len(word_tokenizer()))
    word_tokenizer().save_pretrained(path)
    return path


def artifact(source: Path, folder: Path, recipe: str) -> Path:
    (folder / "recipe.yaml").write_text(recipe)
    return pipeline.export(pipeline.make_plan(source, str(folder / "recipe.yaml")), folder / "out").path


def test_an_exact_cache_answers_as_the_source(source: Path, tmp_path: Path, words: Words) -> None:
    """Both protocols and any step, answer by answer."""
    path = artifact(source, tmp_path, kv_recipe(IDENTITY, IDENTITY, 8))
    model = kvpack.load(path)
    reference = AutoModelForCausalLM.from_pretrained(source)
    ids = make_sequences(TASK, words)
    # What the source says stands where the answers are, so that it is always right.
    said = reference(ids).logits.argmax(-1)
    for at in answer_positions(TASK):
        ids[:, at] = said[:, at - 1]
        said = reference(ids).logits.argmax(-1)
    for step in (1, 7, 32):
        cache = lambda exact: new_cache(model, exact_prefill=exact)  # noqa: E731
        shares, _ = recall(model, ids, TASK, new_cache=cache, step_tokens=step, batch=2)
        assert shares == {"prefill": 1, "decode": 1}
    assert recall(reference, ids, TASK, new_cache=None)[0] == {"weights": 1}


def test_steps_read_what_single_tokens_read(source: Path, tmp_path: Path, words: Words) -> None:
    """The prompt of 80 - 3 tokens does not end with a block; the first step is cut short for it."""
    from kvpack.evaluate.recall import _logits

    blocks = affine(2, "token")
    model = kvpack.load(artifact(source, tmp_path, kv_recipe(blocks, blocks, 16)))
    settings = replace(TASK, tokens=93)
    ids = make_sequences(settings, words)
    with torch.inference_mode():
        one, many = (
            _logits(model, ids, "decode", new_cache(model), settings, step, lambda n: None)
            for step in (1, 16)
        )
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)


def test_an_artifact_beside_its_source(source: Path, tmp_path: Path) -> None:
    blocks = affine(2, "token")
    path = artifact(source, tmp_path, kv_recipe(blocks, blocks, 16))
    found = evaluate_recall(path, source, TASK, batch=2)
    assert found.packed.keys() == {"prefill", "decode"}
    assert found.source is not None
    assert found.kv_bits.keys() == found.packed.keys()
    assert found.kv_bits_per_element == found.kv_bits["decode"] < 16
    assert found.metrics("decode").keys() == set(RECALL_METRICS)
    alone = evaluate_recall(path, None, TASK, protocols=("decode",))
    assert alone.source is None
    assert alone.packed == {"decode": found.packed["decode"]}
    assert score_recall(path, prepare_recall(source, TASK, batch=2), batch=2) == found
    with pytest.raises(UsageError, match="more than the model reads") as caught:
        evaluate_recall(path, None, replace(TASK, tokens=513))
    assert "--recall-tokens 512" in caught.value.hint


FOUND = RecallEvaluation(96, 4, 4, 3, 0, {"prefill": 0.90, "decode": 0.95}, 16.0, 0.97, {"decode": 2.5})


def test_gates_on_recall() -> None:
    gates = parse_gates("recall>=0.92, recall_loss<=0.05,kv_bits<=3", metrics=RECALL_METRICS)
    assert failed_gates(FOUND, gates) == [
        "prefill: recall is 0.9, not >= 0.92",
        "prefill: recall_loss is 0.07, not <= 0.05",
    ]


@pytest.mark.parametrize(("gate", "metrics"), [("kl<=1", RECALL_METRICS), ("recall>=1", METRICS)])
def test_a_gate_of_the_other_task_is_refused(gate: str, metrics: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="cannot read the gate"):
        parse_gates(gate, metrics=metrics)


def test_loss_needs_a_source() -> None:
    with pytest.raises(UsageError, match="compares with a source"):
        parse_gates("recall_loss<=0", compared=False, metrics=RECALL_METRICS)
