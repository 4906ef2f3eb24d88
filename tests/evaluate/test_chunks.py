"""How text becomes scored chunks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvpack.core.errors import UsageError
from kvpack.evaluate.artifact import EvaluationSettings, evaluate
from kvpack.evaluate.protocols import batches, chunks
from tests.evaluate.conftest import Packed
from tests.tiny_models import make_tokenizer

TOKENIZER = make_tokenizer()  # one token per byte


def lengths(documents: list[str], context: int, limit: int = 10_000) -> list[int]:
    return [len(piece) for piece in chunks(documents, TOKENIZER, context, limit)]


def test_one_document_is_cut_without_overlap_and_its_rest_left_out() -> None:
    text = "".join(chr(97 + i % 26) for i in range(107))
    pieces = chunks([text], TOKENIZER, 25, 10_000)
    assert [len(p) for p in pieces] == [25, 25, 25, 25]
    assert torch.cat(pieces).tolist() == TOKENIZER(text)["input_ids"][:100]


def test_a_document_shorter_than_a_chunk_is_scored_whole() -> None:
    assert lengths(["x" * 9], 25) == [9]


def test_several_documents_stay_apart() -> None:
    assert lengths(["x" * 60, "y" * 7, "z", "w" * 25], 25) == [25, 7, 25]


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (25, 1), (26, 2), (75, 3), (999, 4)])
def test_the_limit_is_reached_by_whole_chunks(limit: int, expected: int) -> None:
    assert lengths(["x" * 100], 25, limit) == [25] * expected


@pytest.mark.parametrize("documents", [["x"], ["x", "y"], [""]])
def test_nothing_to_predict_is_an_error(documents: list[str]) -> None:
    with pytest.raises(UsageError, match="fewer than two tokens"):
        chunks(documents, TOKENIZER, 25, 10_000)


def test_only_chunks_of_one_length_share_a_batch() -> None:
    pieces = [torch.full((n,), i) for i, n in enumerate([5, 5, 5, 7, 5, 5])]
    found = list(batches(pieces, 2))
    assert [tuple(b.shape) for b in found] == [(2, 5), (1, 5), (1, 7), (2, 5)]
    assert [row[0].item() for b in found for row in b] == list(range(6)), "in their order"


def test_rows_of_a_jsonl_file_stay_apart_and_other_texts_are_joined(packed: Packed, tmp_path: Path) -> None:
    rows = ["a" * 50, "b" * 30, "c" * 20]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (tmp_path / "rows.txt").write_text("\n\n".join(rows))
    scored = {}
    for name in ("rows.jsonl", "rows.txt"):
        settings = EvaluationSettings(data=str(tmp_path / name), context_tokens=40, max_tokens=1000)
        scored[name] = evaluate(packed("w8"), None, settings).tokens
    assert scored == {"rows.jsonl": 39 + 29 + 19, "rows.txt": 39 + 39}
