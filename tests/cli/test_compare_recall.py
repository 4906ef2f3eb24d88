"""`kvpack compare --task recall`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpack import compare as module
from tests.cli.conftest import Kvpack, Run

SIZE = ["--recall-tokens", "100", "--recall-facts", "5", "--recall-questions", "7", "--sequences", "2"]
METRICS = {"recall", "recall_loss", "weight_bits", "kv_bits"}


@pytest.fixture
def compare(call_kvpack: Kvpack, speaker: str) -> Kvpack:
    def run(recipes: str, *arguments: str) -> Run:
        amount = ["calibration.samples=4", "calibration.sample_tokens=32", "calibration.data=recall:64:5"]
        options = [word for item in amount for word in ("--set", item)]
        task = ["--task", "recall", *SIZE]
        return call_kvpack("compare", speaker, "--recipes", recipes, *task, *options, *arguments)

    return run


def test_json_is_that_of_single_evaluations(
    compare: Kvpack, call_kvpack: Kvpack, speaker: str, tmp_path: Path
) -> None:
    done = compare("kivi,rotatekv@4bit", "--budget-bits", "12", "--json", "--recall-seed", "3")
    data = done.json["data"]
    assert done.err == ""
    sizes = {"tokens": 100, "facts": 5, "questions": 7, "sequences": 2, "seed": 3}
    assert {name: data[name] for name in sizes} == sizes
    assert (data["task"], data["source_bits"], data["missing"]) == ("recall", 32, [])
    assert data["frontier"].keys() == data["best"].keys() == {"prefill", "decode"}
    rows = {row["recipe"]: row for row in data["recipes"]}
    assert rows.keys() == {"kivi", "rotatekv@4bit"}
    for row in rows.values():
        for metrics in row["packed"].values():
            assert metrics.keys() == {*METRICS, "fits"}
            assert metrics["recall_loss"] == pytest.approx(data["source"]["recall"] - metrics["recall"])
    path = str(tmp_path / "out")
    assert call_kvpack("export", speaker, "-r", "kivi", "-o", path).code == 0
    alone = call_kvpack(
        "eval", path, "--source", speaker, "--task", "recall", *SIZE, "--recall-seed", "3", "--json"
    ).json["data"]
    assert data["source"] == alone["source"]
    for name, metrics in alone["packed"].items():
        assert rows["kivi"]["packed"][name]["recall"] == metrics["recall"]
    assert rows["kivi"]["packed"]["decode"]["kv_bits"] == alone["kv_bits_per_element"]
    assert rows["kivi"]["packed"]["prefill"]["kv_bits"] < rows["kivi"]["packed"]["decode"]["kv_bits"]


def test_text_streams_results_and_ends_in_a_table(compare: Kvpack) -> None:
    done = compare("kivi,fp8", "--budget-bits", "9")
    assert done.code == 0
    said = [line for line in done.err.splitlines() if "recall " in line and ": prefill" in line]
    assert [line.split(":")[0] for line in said] == ["kivi", "fp8"]
    lines = done.out.splitlines()
    assert lines[0] == "14 questions about 5 facts in 2 sequences of 100 tokens"
    assert "A recall  A lost" in lines[1]
    assert lines[2].startswith("source")
    assert {line.split()[0] for line in lines[3:5]} == {"kivi", "fp8"}
    assert lines[-1].startswith("best within 9 bits, B: ")


def test_the_source_is_asked_once(compare: Kvpack, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, calls = module.prepare_recall, []

    def counted(*args, **options):
        calls.append(args)
        return prepare(*args, **options)

    monkeypatch.setattr(module, "prepare_recall", counted)
    assert compare("kivi,fp8").code == 0
    assert len(calls) == 1


def test_a_failing_recipe_is_a_row(compare: Kvpack, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "kvpack: 1\nname: bad\nextends: [kivi]\nkv_cache:\n"
        "  key: {transforms: [{kind: hadamard}], fold: true}\n"
    )
    rows = compare(f"{bad},kivi", "--json").json["data"]["recipes"]
    assert [(row["recipe"], row["packed"] is None) for row in rows] == [("kivi", False), (str(bad), True)]
    assert "fold" in rows[1]["reason"]


def test_weights_alone_have_no_bits(compare: Kvpack) -> None:
    rows = compare("w8,kivi", "--json").json["data"]["recipes"]
    assert [row["recipe"] for row in rows] == ["kivi", "w8"]
    assert rows[1]["packed"].keys() == {"weights"}
    assert rows[1]["packed"]["weights"]["kv_bits"] is None


def test_reports(compare: Kvpack, tmp_path: Path) -> None:
    page, picture = tmp_path / "out.html", tmp_path / "out.svg"
    assert compare("kivi,fp8", "--report", str(page)).code == 0
    text = page.read_text()
    assert "Recall against bits" in text
    assert "14 questions about 5 facts" in text
    assert text.count("<circle") == 4
    assert text.count('class="source"') == 2
    assert compare("kivi", "--report", str(picture)).code == 0
    assert "recall, share of right answers" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--data", "x.txt"], "--data belongs to --task text"),
        (["--task", "recal"], "--task cannot be 'recal'"),
        (["--recall-tokens", "20"], "too few"),
        (["--recall-tokens", "5000"], "more than the model reads"),
    ],
)
def test_wrong_use_is_refused(compare: Kvpack, arguments: list[str], text: str) -> None:
    done = compare("kivi", *arguments)
    assert done.code == 2
    assert text in done.err
    assert done.out == ""


def test_a_text_model_is_refused(call_kvpack: Kvpack, tiny_source: str) -> None:
    done = call_kvpack("compare", tiny_source, "--recipes", "kivi", "--task", "recall")
    assert done.code == 2
    assert "not one of the recall task" in done.err
    data = ["--set", "calibration.data=recall:64"]
    done = call_kvpack("export", tiny_source, "-r", "rotatekv", *data, "-o", tiny_source + "-none")
    assert done.code == 2
    assert "not one of the recall task" in done.err
