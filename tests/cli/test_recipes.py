"""`kvpack recipes`."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from kvpack.calibrate.identity import needs_calibration
from kvpack.recipe.fitting import needs_data
from kvpack.recipe.load import load, variants
from kvpack.recipe.locate import bundled
from kvpack.report import reference_bits, reference_plan
from tests.cli.conftest import Kvpack


def test_list_names_every_bundled_recipe(run_kvpack: Kvpack) -> None:
    rows = {row["name"]: row for row in run_kvpack("recipes", "list", "--json").json["data"]["recipes"]}
    assert rows.keys() == {name for name in bundled() if "/" not in name}
    assert rows["rotatekv-w4"]["needs_data"]
    assert rows["a2ats"]["needs_data"]
    assert not rows["kivi"]["needs_data"]
    assert rows["kivi"]["paper"] == "2402.02750"
    assert rows["w4"]["weights"]
    assert not rows["w4"]["kv_cache"]
    assert "4bit" in rows["kivi"]["variants"]


def test_list_counts_every_stored_bit(run_kvpack: Kvpack) -> None:
    rows = {row["name"]: row for row in run_kvpack("recipes", "list", "--json").json["data"]["recipes"]}
    # Groups of 32 share two 16-bit numbers, the newest 128 of 4096 values are exact, positions are int32.
    exact = 128 / 4096 * (16 - 3) / 2
    positions = 32 / (32 * 2 * 8 * 128)
    assert rows["kivi"]["kv_bits"] == pytest.approx(2 + 32 / 32 + exact + positions)
    assert rows["kivi"]["weight_bits"] is None
    # Three layers of 32 at 4 bits, the others at 3; groups of 128; one plane, as wide as both.
    assert rows["xquant-cl"]["kv_bits"] == pytest.approx((3 * 4 + 29 * 3) / 32 + 32 / 128 + positions)
    assert rows["w4"]["weight_bits"] == pytest.approx(4 + 24 / 128)
    assert rows["w4"]["kv_bits"] is None
    refused = rows["xquant-cl-rotated"]
    assert refused["kv_bits"] is None
    assert "before its norm" in refused["refused"]
    assert all((row["kv_bits"] or row["refused"]) for row in rows.values() if row["kv_cache"])


def test_list_fits_into_100_columns(run_kvpack: Kvpack) -> None:
    lines = run_kvpack("recipes", "list").out.splitlines()
    assert max(map(len, lines)) <= 100
    kivi = next(line for line in lines if line.startswith("kivi "))
    assert kivi.split() == ["kivi", "2402.02750", "faithful", "no", "3.20", "-"]


def test_show_gives_the_bits_of_every_variant(run_kvpack: Kvpack) -> None:
    changed = ("--bits", "--set", "kv_cache.policy.recent_tokens=0")
    shown = run_kvpack("recipes", "show", "kivi@4bit", *changed, "--json").json["data"]["bits"]
    assert [row["recipe"] for row in shown][:2] == ["kivi", "kivi@4bit"]
    assert len(shown) == 1 + len(variants("kivi"))
    assert shown[1]["kv_bits"] - shown[0]["kv_bits"] == pytest.approx(2)
    text = run_kvpack("recipes", "show", "xquant-cl", "--bits").out
    assert "xquant-cl@residual is refused there: xquant-cl.yaml" in text


@pytest.mark.parametrize("name", [name for name in bundled() if "/" not in name])
def test_a_recipe_needs_data_when_its_plan_does(name: str) -> None:
    for reference in (name, *(f"{name}@{variant}" for variant in variants(name))):
        loaded = load(reference)
        if reference_bits(loaded).refused is None:
            plan = reference_plan(loaded)
            assert needs_data(loaded.recipe) == needs_calibration(plan), reference


def test_show_prints_the_file_itself(run_kvpack: Kvpack) -> None:
    assert run_kvpack("recipes", "show", "kivi").out.rstrip() == bundled()["kivi"].read_text().rstrip()


def test_resolved_text_is_a_recipe_with_the_same_hash(run_kvpack: Kvpack, tmp_path: Path) -> None:
    done = run_kvpack("recipes", "show", "rotatekv-w4@4bit", "--resolved")
    path = tmp_path / "resolved.yaml"
    path.write_text(done.out)
    assert load(str(path)).sha256 == load("rotatekv-w4@4bit").sha256
    assert load(str(path)).sha256 in done.out


def test_override_shows_in_the_output(run_kvpack: Kvpack) -> None:
    done = run_kvpack("recipes", "show", "kivi", "--set", "kv_cache.policy.recent_tokens=64")
    assert yaml.safe_load(done.out)["kv_cache"]["policy"]["recent_tokens"] == 64


def test_explain_names_the_origin_of_every_value(run_kvpack: Kvpack) -> None:
    done = run_kvpack("recipes", "show", "kivi-sinks", "--explain", "--set", "calibration.batch=2")
    lines = {line.split()[0]: line.split() for line in done.out.splitlines()}
    assert lines["kv_cache.policy.sink_tokens"][1:] == ["4", "sinks.yaml:6"]
    assert lines["kv_cache.policy.recent_tokens"][1:] == ["128", "kivi.yaml:21"]
    assert lines["calibration.batch"][1:] == ["2", "--set"]
    assert lines["calibration.seed"][1:] == ["0", "default"]


def test_validate_lists_all_problems_with_places(run_kvpack: Kvpack, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("kvpack: 1\nname: my\nextends: kivi\ncalibration:\n  sampels: 4\n  seed: x\n")
    done = run_kvpack("recipes", "validate", str(path))
    assert done.code == 2
    assert done.err.splitlines() == [
        f"error: {path}:5:3: calibration.sampels: unknown key (did you mean 'samples'?)",
        f"error: {path}:6:9: calibration.seed: expected a whole number, got 'x'",
    ]


def test_validate_against_a_model(call_kvpack: Kvpack, demo_model: str) -> None:
    good = call_kvpack("recipes", "validate", "rotatekv-w4", "--model", demo_model, "--json").json["data"]
    assert good["packed_layers"] > 0
    assert good["kv_layers"] > 0
    bad = call_kvpack("recipes", "validate", "w4", "--model", demo_model, "--set", "weights.0.match=mlp.gate")
    assert bad.code == 2
    assert "weights.0.match: 'mlp.gate'" in bad.err
    assert "gate_proj (" in bad.err


def test_schema_output_is_the_schema_itself(run_kvpack: Kvpack) -> None:
    schema = json.loads(run_kvpack("recipes", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert run_kvpack("recipes", "schema", "--json").json["data"] == schema
