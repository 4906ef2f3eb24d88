"""Comparisons made of nothing but numbers."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kvpack.evaluate.frontier import Comparison, Entry
from kvpack.evaluate.scores import Evaluation, Scores
from kvpack.evaluate.stored_errors import LayerError

Compared = Callable[..., Comparison]


def evaluation(bits: float, kl: float | None, *, weights: float = 16.0, ppl: float = 8.0) -> Evaluation:
    scores = Scores(ppl, kl, None if kl is None else 0.9)
    return Evaluation(
        text="text.txt",
        tokens=100,
        context_tokens=50,
        step_tokens=1,
        packed={"prefill": scores, "decode": scores},
        bits_per_weight=weights,
        source=None if kl is None else Scores(7.0),
        kv_bits_per_element=bits,
        kv_bytes_per_token=64.0,
        kv_bits={"prefill": bits, "decode": bits + 1},
        layer_errors=(LayerError(0, 0.1, 0.2), LayerError(1, 0.3, 0.0)),
    )


@pytest.fixture
def compared() -> Compared:
    """A comparison of `count` recipes with random numbers, and whatever else is asked for."""

    def make(count: int = 5, *names: str, **fields: object) -> Comparison:
        chosen = random.Random(count)
        entries = [
            Entry(
                names[i] if i < len(names) else f"recipe-{i}@variant",
                evaluation(chosen.uniform(1.5, 9), 10 ** chosen.uniform(-4, 0.5), ppl=chosen.uniform(7, 9)),
            )
            for i in range(count)
        ]
        return Comparison(str(fields.pop("model", "model")), tuple(entries), 16, **fields)

    return make
