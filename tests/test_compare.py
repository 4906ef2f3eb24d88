"""Comparing recipes: what is run, what is found, what survives a failure."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvpack import compare as module
from kvpack import pipeline
from kvpack.compare import Job, compare, expand
from kvpack.core.errors import RecipeError, UsageError
from kvpack.evaluate.artifact import EvaluationSettings, evaluate
from kvpack.evaluate.frontier import Comparison, Entry

SMALL = ("calibration.samples=6", "calibration.sample_tokens=48")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("compare") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12)
    return str(path)


@pytest.fixture
def job(checkpoint: Callable[[str], Path], text: str) -> Job:
    settings = EvaluationSettings(data=text, context_tokens=96, max_tokens=192, step_tokens=16)
    return Job(str(checkpoint("llama")), ("kivi", "rotatekv", "rotatekv@4bit"), SMALL, None, settings)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["kivi", "rotatekv@4bit", "kivi"], ["kivi", "rotatekv@4bit"]),
        (["kivi@*"], ["kivi@4bit", "kivi@2bit-per-token", "kivi@4bit-per-token"]),
        (["rotatekv@[34]bit"], ["rotatekv@3bit", "rotatekv@4bit"]),
        (["fp8", "kivi*"], ["fp8", "kivi", "kivi-sinks"]),
    ],
)
def test_patterns(patterns: list[str], expected: list[str]) -> None:
    assert expand(patterns) == expected


def test_all_are_the_bundled_recipes_with_a_cache() -> None:
    names = expand(["all"])
    assert {"kivi", "fp8", "rotatekv", "rotatekv-w4"} <= set(names)
    assert "w4" not in names
    assert not any(name.startswith("fragments/") or "@" in name for name in names)


def test_a_path_with_brackets_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine[1].yaml"
    path.write_text("kvpack: 1\nname: mine\nextends: [kivi]\n")
    assert expand([str(path)]) == [str(path)]


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        (["kiwi"], RecipeError, "did you mean 'kivi'"),
        (["kivi@5bit"], RecipeError, "5bit"),
        (["nothing*"], UsageError, "no recipe matches 'nothing\\*'"),
        ([], UsageError, "no recipes to compare"),
    ],
)
def test_what_leads_nowhere_is_refused_at_once(patterns: list[str], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        expand(patterns)


def test_scores_are_those_of_separate_evaluations(job: Job, tmp_path: Path) -> None:
    seen: list[Entry] = []
    found = compare(job, found=seen.append)
    assert [e.recipe for e in found.entries] == list(job.recipes)
    assert seen == list(found.entries)
    for entry in found.entries:
        path = tmp_path / entry.recipe
        pipeline.export(pipeline.make_plan(job.model, entry.recipe, job.overrides), path)
        alone = evaluate(path, job.model, job.settings)
        together = entry.evaluation
        assert together is not None
        for name, scores in alone.packed.items():
            assert together.packed[name].perplexity == pytest.approx(scores.perplexity, rel=1e-4)
            assert together.packed[name].kl == pytest.approx(scores.kl, rel=1e-2, abs=1e-6)
        assert together.kv_bits == alone.kv_bits
        assert together.source == alone.source
    assert found.source_bits == 32
    assert found.missing == ()


def test_calibration_runs_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    compare(job, progress=lambda stage, done, total, detail="": seen.append((stage, done)))
    assert [done for stage, done in seen if stage == "calibrate"] == [0, 1, 2]
    assert [done for stage, done in seen if stage == "check"] == [0, 1]
    scored = [done for stage, done in seen if stage == "compare"]
    assert scored == sorted(scored)


def test_artifacts_are_deleted_one_by_one(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    counts: list[int] = []

    def count(entry: Entry) -> None:
        counts.append(len(list(tmp_path.glob("*/artifact"))))

    compare(replace(job, recipes=("kivi", "fp8")), found=count)
    assert max(counts) <= 1
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_does_not_suit_is_a_row(
    checkpoint: Callable[[str], Path], job: Job, tmp_path: Path
) -> None:
    # The projection of GPT-NeoX's values cannot be folded: it is fused with the other two.
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "kvpack: 1\nname: bad\nextends: [kivi]\nkv_cache:\n"
        "  key: {transforms: [{kind: hadamard}], fold: true}\n"
    )
    found = compare(replace(job, recipes=(str(bad), "kivi")))
    rows = {e.recipe: e for e in found.entries}
    assert rows[str(bad)].evaluation is None
    assert "fold" in rows[str(bad)].reason
    assert not rows[str(bad)].bug
    assert rows["kivi"].evaluation is not None
    with pytest.raises(RecipeError, match="fold"):
        compare(replace(job, recipes=(str(bad),)))


def test_a_bug_in_one_recipe_is_a_row_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    export = module.export

    def broken(plan, *args, **options):
        if plan.recipe.variant == "4bit":
            raise TypeError("spilled coffee")
        return export(plan, *args, **options)

    monkeypatch.setattr(module, "export", broken)
    found = compare(replace(job, recipes=("kivi@4bit", "kivi")))
    assert [(e.bug, bool(e.evaluation)) for e in found.entries] == [(True, False), (False, True)]
    assert found.entries[0].reason == "TypeError: spilled coffee"


def interrupted(job: Job, monkeypatch: pytest.MonkeyPatch, after: int) -> Comparison:
    score, calls = module.score, []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return score(*args, **options)

    monkeypatch.setattr(module, "score", stopping)
    return compare(job)


def test_an_interruption_keeps_what_is_there(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    found = interrupted(replace(job, recipes=("kivi", "fp8", "kivi@4bit")), monkeypatch, 1)
    assert [e.recipe for e in found.entries] == ["kivi"]
    assert found.missing == ("fp8", "kivi@4bit")


def test_an_interruption_before_anything_is_one(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(job, monkeypatch, 0)


def test_sinks_come_on_demand(job: Job) -> None:
    assert compare(replace(job, recipes=("kivi",))).sinks == {}
    found = compare(replace(job, recipes=("kivi",), sinks=True))
    assert len(found.sinks["layers"]) == 2
