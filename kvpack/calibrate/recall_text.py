"""Text of the recall task: facts among filler words, asked again at the end.

One lost token, one wrong answer. Evaluation asks for the answers; calibration takes sequences of
its own as text, for models that know no other.

A sequence is ``<bos>``, then facts ``key value ;`` scattered among fillers, then questions
``? key value ;``; a model answers with its most likely token after ``? key``. The vocabulary is
that of `recall-1m`, a word-level one whose words fall into classes by their form.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvpack.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

FACT, QUESTION = 3, 4
"""Tokens of a fact ``key value ;`` and of a question ``? key value ;``."""

_ASK, _END = "?", ";"


@dataclass(frozen=True)
class RecallSettings:
    """Size of the task.

    `tokens` counts the whole sequence, questions included. `questions` None asks for every fact
    once; fewer leave facts out, more go round again in another order. Negative seeds are for
    calibration, so that it never sees what an evaluation asks.
    """

    tokens: int = 1024
    facts: int = 16
    questions: int | None = None
    sequences: int = 32
    seed: int = 0

    @property
    def asked(self) -> int:
        """Questions per sequence."""
        return self.facts if self.questions is None else self.questions

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first question."""
        return self.tokens - QUESTION * self.asked


@dataclass(frozen=True)
class Words:
    """Token ids by their part in the task."""

    start: int
    ask: int
    end: int
    keys: tuple[int, ...]
    values: tuple[int, ...]
    fillers: tuple[int, ...]


def words_of(tokenizer: Any, where: str) -> Words:
    """Sort a tokenizer's vocabulary into the classes of the task.

    Values are a capital and a digit (``A0``). Fillers are five letters, two of a start and three of
    an end that other words have, too (``badar``); all pairs of their starts and ends are words.
    Every other lower-case word is a key. The rest may be special tokens and the two marks only.

    Raises:
        UsageError: the vocabulary, of the model at `where`, is of another kind.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens) | {_ASK, _END}
    names = sorted(set(vocabulary) - special, key=lambda name: vocabulary[name])
    values = [n for n in names if re.fullmatch(r"[A-Z][0-9]", n)]
    plain = [n for n in names if re.fullmatch(r"[a-z]{3,}", n)]
    fillers = _fillers(plain)
    strange = sorted(set(names) - set(values) - set(plain), key=lambda name: vocabulary[name])
    missing = [mark for mark in (_ASK, _END) if mark not in vocabulary]
    if strange or missing or tokenizer.bos_token_id is None:
        found = f"it has the token {strange[0]!r}" if strange else f"it has no {missing or ['<bos>']}"
        raise _another_kind(where, found)
    keys = [n for n in plain if n not in fillers]
    for kind, members in (("keys", keys), ("values", values), ("fillers", fillers)):
        if len(members) < 2:
            raise _another_kind(where, f"it has {len(members)} words that can be {kind}")
    groups = (tuple(vocabulary[n] for n in group) for group in (keys, values, sorted(fillers)))
    return Words(int(tokenizer.bos_token_id), vocabulary[_ASK], vocabulary[_END], *groups)


def _another_kind(where: str, why: str) -> UsageError:
    return UsageError(
        "its tokenizer is not one of the recall task",
        where=where,
        why=why,
        hint="the task needs a word-level vocabulary of keys, values A0 to Z9 and two-syllable fillers, "
        "such as that of recall-1m",
    )


def _fillers(plain: list[str]) -> set[str]:
    """The words of five letters that are a full product of starts and ends; none when there is no such."""
    short = [n for n in plain if len(n) == 5]
    starts, ends = Counter(n[:2] for n in short), Counter(n[2:] for n in short)
    found = {n for n in short if starts[n[:2]] > 1 and ends[n[2:]] > 1}
    product = {a + b for a in {n[:2] for n in found} for b in {n[2:] for n in found}}
    return found if found == product else set()


def filler_count(settings: RecallSettings, words: Words) -> int:
    """Fillers of a sequence.

    Raises:
        UsageError: the sequence is too short for its facts and questions, or there are too few keys.
    """
    room = settings.prompt_tokens - 1 - FACT * settings.facts
    if room < 0:
        raise UsageError(
            f"{settings.tokens} tokens are too few for {settings.facts} facts and {settings.asked} questions",
            hint=f"they need {settings.tokens - room}",
        )
    if not 1 <= settings.facts <= len(words.keys) or settings.asked < 1:
        raise UsageError(
            f"cannot ask {settings.asked} times for {settings.facts} facts",
            why="a sequence has at least one question, and its facts have different keys",
            hint=f"use 1 to {len(words.keys)} facts",
        )
    return room


def make_sequences(settings: RecallSettings, words: Words) -> Tensor:
    """Token ids int64 [sequences, tokens]; more sequences begin with the same ones.

    Questions stand at the end, so that `answer_positions` holds for every row.

    Raises:
        UsageError: as `filler_count`.
    """
    import torch

    room = filler_count(settings, words)
    generator = torch.Generator().manual_seed(settings.seed)
    rows = [_sequence(settings, words, room, generator) for _ in range(settings.sequences)]
    return torch.tensor(rows, dtype=torch.int64)


def _sequence(settings: RecallSettings, words: Words, fillers: int, generator: Generator) -> list[int]:
    import torch

    def draw(below: int, count: int) -> list[int]:
        return torch.randint(below, (count,), generator=generator).tolist()

    def shuffled(count: int) -> list[int]:
        return torch.randperm(count, generator=generator).tolist()

    keys = [words.keys[i] for i in shuffled(len(words.keys))[: settings.facts]]
    values = [words.values[i] for i in draw(len(words.values), settings.facts)]
    filler = [words.fillers[i] for i in draw(len(words.fillers), fillers)]
    cuts = sorted(draw(fillers + 1, settings.facts))
    row, at = [words.start], 0
    for key, value, cut in zip(keys, values, cuts, strict=True):
        row += [*filler[at:cut], key, value, words.end]
        at = cut
    row += filler[at:]
    rounds = -(-settings.asked // settings.facts)
    for fact in [i for _ in range(rounds) for i in shuffled(settings.facts)][: settings.asked]:
        row += [words.ask, keys[fact], values[fact], words.end]
    return row


def answer_positions(settings: RecallSettings) -> list[int]:
    """Where the answers stand; the logits one position earlier are asked for them."""
    return [settings.prompt_tokens + QUESTION * i + 2 for i in range(settings.asked)]


def read_spec(spec: str) -> RecallSettings:
    """Read ``recall:TOKENS[:FACTS]``, a name of calibration text.

    Raises:
        UsageError: it is of another form.
    """
    found = re.fullmatch(r"recall:([0-9]{1,9})(?::([0-9]{1,9}))?", spec)
    if found is None:
        raise UsageError(f"cannot read {spec!r}", hint="write recall:TOKENS[:FACTS], for example recall:1024")
    facts = RecallSettings.facts if found[2] is None else int(found[2])
    return RecallSettings(int(found[1]), facts)


def recall_samples(
    settings: RecallSettings, words: Words, samples: int, sample_tokens: int, seed: int
) -> Tensor:
    """Sequences joined and cut into samples, as other text is; each sample begins with ``<bos>``.

    Args:
        settings: size of the sequences; those of `sample_tokens` tokens become a sample each.
        words: the vocabulary.
        samples: how many samples N.
        sample_tokens: tokens T of each.
        seed: decides the sequences, which are none that `--recall-seed` gives.

    Returns:
        Token ids, int64 [N, T].

    Raises:
        UsageError: as `filler_count`.
    """
    import torch

    body = sample_tokens - 1
    count = -(-samples * body // max(settings.tokens - 1, 1))
    found = make_sequences(replace(settings, sequences=count, seed=-1 - abs(seed)), words)
    rows = found[:, 1:].flatten()[: samples * body].view(samples, body)
    return torch.cat([found.new_full((samples, 1), words.start), rows], dim=1)
