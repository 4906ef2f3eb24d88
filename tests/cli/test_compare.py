"""`kvpack compare`, and the picture that it and `kvpack eval` draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpack import compare as module
from tests.cli.conftest import Kvpack, Run

SCORES = {"ppl", "ppl_ratio", "kl", "top1", "weight_bits", "kv_bits"}
SMALL = ["--context", "96", "--max-tokens", "192", "--step", "16"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12)
    return str(path)


@pytest.fixture
def compare(call_kvpack: Kvpack, tiny_source: str, text: str) -> Kvpack:
    def run(recipes: str, *arguments: str) -> Run:
        settings = ["--set", "calibration.samples=4", "--set", "calibration.sample_tokens=32"]
        return call_kvpack(
            "compare", tiny_source, "--recipes", recipes, "--data", text, *SMALL, *settings, *arguments
        )

    return run


def test_json(compare: Kvpack, tiny_source: str) -> None:
    done = compare("kivi,fp8,rotatekv@4bit", "--budget-bits", "8.5", "--json")
    data = done.json["data"]
    assert done.err == ""
    assert data["model"] == tiny_source
    assert (data["text"], data["tokens"], data["context_tokens"]) == ("text.txt", 190, 96)
    assert (data["source_bits"], data["budget_bits"], data["missing"]) == (32, 8.5, [])
    rows = {row["recipe"]: row for row in data["recipes"]}
    assert rows.keys() == {"kivi", "fp8", "rotatekv@4bit"}
    bits = [row["packed"]["prefill"]["kv_bits"] for row in data["recipes"]]
    assert bits == sorted(bits)
    for row in rows.values():
        assert row["reason"] is None
        assert row["seconds"] > 0
        assert len(row["layer_errors"]) == 2
        for name, metrics in row["packed"].items():
            assert metrics.keys() == {*SCORES, "fits"}
            assert metrics["fits"] == (metrics["kv_bits"] <= 8.5)
            assert (data["best"][name] == row["recipe"]) <= metrics["fits"]
    assert data["frontier"].keys() == {"prefill", "decode"}
    assert set(data["frontier"]["prefill"]) <= rows.keys()


def test_text_streams_results_and_ends_in_a_table(compare: Kvpack) -> None:
    done = compare("kivi,fp8", "--budget-bits", "9")
    assert done.code == 0
    said = [line for line in done.err.splitlines() if "ppl" in line]
    assert [line.split(":")[0] for line in said] == ["kivi", "fp8"]
    lines = done.out.splitlines()
    assert lines[0] == "190 tokens of text.txt, chunks of 96"
    assert lines[2].startswith("source")
    assert {line.split()[0] for line in lines[3:5]} == {"kivi", "fp8"}
    assert lines[-2].startswith("best within 9 bits, A: ")
    assert lines[-1].startswith("best within 9 bits, B: ")


def test_a_failing_recipe_is_a_row(compare: Kvpack, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "kvpack: 1\nname: bad\nextends: [kivi]\nkv_cache:\n"
        "  key: {transforms: [{kind: hadamard}], fold: true}\n"
    )
    done = compare(f"{bad},kivi")
    assert done.code == 0
    assert f"not measured: {bad}: " in done.out
    rows = compare(f"{bad},kivi", "--json").json["data"]["recipes"]
    assert [(row["recipe"], row["packed"] is None) for row in rows] == [("kivi", False), (str(bad), True)]
    assert "fold" in rows[1]["reason"]


def test_ctrl_c_prints_what_is_there(compare: Kvpack, monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = module.score, []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **options)

    monkeypatch.setattr(module, "score", stopping)
    done = compare("kivi,fp8")
    assert done.code == 75
    assert "kivi" in done.out
    assert "1 recipes were not measured: fp8" in done.err


def test_a_bug_does_not_hide_the_rest(compare: Kvpack, monkeypatch: pytest.MonkeyPatch) -> None:
    export = module.export

    def broken(plan, *args, **options):
        if plan.recipe.recipe.name == "fp8":
            raise TypeError("spilled coffee")
        return export(plan, *args, **options)

    monkeypatch.setattr(module, "export", broken)
    done = compare("fp8,kivi", "--json")
    assert done.code == 70
    assert "spilled coffee" in done.json["error"]["message"]
    assert [row["packed"] is None for row in done.json["data"]["recipes"]] == [False, True]


@pytest.mark.parametrize(
    ("recipes", "arguments", "text"),
    [
        ("kiwi", [], "did you mean 'kivi'"),
        ("x*", [], "no recipe matches 'x*'"),
        (",", [], "no recipes to compare"),
        (",".join(["kivi"] * 80 + ["kivvi"]), [], "kivvi"),
        ("kivi", ["--report", "a.png"], "is neither .html nor .svg"),
        ("kivi", ["--report", "no/such/a.html"], "its folder does not exist"),
        ("kivi", ["--budget-bits", "0"], "--budget-bits"),
        ("kivi", ["--set", "kv_cache.nothing=1"], "nothing"),
    ],
)
def test_wrong_use_is_refused(compare: Kvpack, recipes: str, arguments: list[str], text: str) -> None:
    done = compare(recipes, *arguments)
    assert done.code == 2
    assert text in done.err
    assert done.out == ""


def test_reports(compare: Kvpack, tmp_path: Path) -> None:
    page, picture = tmp_path / "out.html", tmp_path / "out.svg"
    done = compare("kivi,fp8", "--report", str(page))
    assert done.out.splitlines()[-1] == f"wrote {page}"
    assert "attention sinks" in page.read_text()
    assert compare("kivi", "--report", str(picture)).code == 0
    assert picture.read_text().startswith("<svg")
    before = page.read_bytes()
    again = compare("kivi", "--report", str(page))
    assert again.code == 2
    assert "exists already" in again.err
    assert page.read_bytes() == before
    assert compare("kivi", "--report", str(page), "--force").code == 0
    assert b"fp8" not in page.read_bytes()


def test_eval_draws_one_artifact(
    call_kvpack: Kvpack, tiny_artifact: str, tiny_source: str, text: str, tmp_path: Path
) -> None:
    page = tmp_path / "out.html"
    common = ["eval", tiny_artifact, "--data", text, *SMALL, "--report", str(page)]
    done = call_kvpack(*common, "--source", tiny_source)
    assert done.code == 0
    assert "kivi" in page.read_text()
    assert "Error per layer" in page.read_text()
    assert call_kvpack(*common).code == 2
    assert call_kvpack(*common, "--force", "--kv", "decode").code == 0
    assert "nothing to draw" not in page.read_text()
