"""Loading recipes: precedence, extends, variants, overrides, and errors that say where."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from kvpack.core.errors import RecipeError, RecipeErrors
from kvpack.core.registry import kind_of
from kvpack.recipe.load import load, variants
from kvpack.recipe.locate import bundled, split_variant

BUNDLED = [name for name in bundled() if "/" not in name]
ALL = [ref for name in BUNDLED for ref in (name, *(f"{name}@{v}" for v in variants(name)))]

MINIMAL = """
    kvpack: 1
    name: mine
    kv_cache:
      tiers:
        recent: {codec: {kind: identity}}
        old: {codec: {kind: affine, bits: 4}}
      policy: {kind: sink_recent}
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    return str(path)


def messages(reference: str, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(reference, overrides or ())
    error = caught.value
    return [e.message for e in error.errors] if isinstance(error, RecipeErrors) else [error.message]


@pytest.mark.parametrize("reference", ALL)
def test_bundled_recipe_loads(reference: str) -> None:
    loaded = load(reference)
    assert loaded.recipe.name == reference.partition("@")[0]
    assert loaded.recipe.summary
    assert loaded.recipe.fidelity is not None


@pytest.mark.parametrize("name", [n for n in bundled() if "/" not in n])
def test_bundled_recipe_says_what_it_does_and_how_to_run_it(name: str) -> None:
    lines = bundled()[name].read_text().splitlines()
    head = lines[: lines.index("kvpack: 1")]
    assert all(line.startswith("#") for line in head)
    assert any(f"kvpack export MODEL --recipe {name}" in line for line in head)


def test_every_variant_differs_from_its_recipe() -> None:
    for name in BUNDLED:
        hashes = [load(ref).sha256 for ref in ALL if ref.partition("@")[0] == name]
        assert len(set(hashes)) == len(hashes), name


def test_name_path_and_suffix_lead_to_the_same_recipe() -> None:
    path = str(bundled()["kivi"])
    assert {load(r).sha256 for r in ("kivi", "kivi.yaml", path)} == {load("kivi").sha256}


def test_a_path_wins_over_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, MINIMAL, "kivi.yaml")
    monkeypatch.chdir(tmp_path)
    assert load("kivi").recipe.name == "mine"


def test_own_file_may_extend_the_bundled_recipe_of_its_name(tmp_path: Path) -> None:
    mine = write(tmp_path, "kvpack: 1\nname: kivi\nextends: kivi\ncalibration: {seed: 1}\n", "kivi.yaml")
    loaded = load(mine)
    assert loaded.recipe.calibration.seed == 1
    assert loaded.recipe.kv_cache == load("kivi").recipe.kv_cache


def test_extends_merges_from_left_to_right_and_the_file_wins(tmp_path: Path) -> None:
    write(tmp_path, "kvpack: 1\nname: a\nsummary: a\ncalibration: {samples: 1, batch: 2}\n", "a.yaml")
    write(tmp_path, "kvpack: 1\nname: b\ncalibration: {samples: 3, sample_tokens: 8}\n", "b.yaml")
    mine = write(tmp_path, "kvpack: 1\nname: c\nextends: [a, b.yaml]\ncalibration: {sample_tokens: 16}\n")
    recipe = load(mine).recipe
    assert (recipe.calibration.samples, recipe.calibration.batch) == (3, 2)
    assert recipe.calibration.sample_tokens == 16
    assert recipe.summary == "", "a summary describes one recipe and is not inherited"


def test_another_kind_replaces_the_whole_part(tmp_path: Path) -> None:
    mine = write(tmp_path, "kvpack: 1\nname: c\nextends: kivi\nkv_cache: {policy: {kind: sink_detect}}\n")
    policy = load(mine).resolved["kv_cache"]["policy"]
    assert policy["kind"] == "sink_detect"
    assert "sink_tokens" not in policy


def test_fragment_changes_one_setting() -> None:
    policy = load("kivi-sinks").resolved["kv_cache"]["policy"]
    assert policy == {**load("kivi").resolved["kv_cache"]["policy"], "sink_tokens": 4}


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "kvpack: 1\nname: b\nextends: c\n", "b.yaml")
    (message,) = messages(write(tmp_path, "kvpack: 1\nname: c\nextends: b\n", "c.yaml"))
    assert "circle" in message
    assert message.index("c.yaml") < message.rindex("b.yaml") < message.rindex("c.yaml")


def test_unknown_parent_names_the_line(tmp_path: Path) -> None:
    mine = write(tmp_path, "kvpack: 1\nname: c\nextends: kivy\n")
    (message,) = messages(mine)
    assert message.startswith(f"{mine}:3:10: ")
    assert "did you mean 'kivi'" in message


def test_variant_and_override_precedence() -> None:
    loaded = load("rotatekv@4bit", ["kv_cache.tiers.old.codec.bits=5"])
    old = loaded.recipe.kv_cache.tiers["old"]
    assert (old.key.bits, old.value.bits) == (5, 5)
    assert old.key.clip == 1.0, "set by the variant"
    assert loaded.origins["kv_cache.tiers.old.key.bits"] == "--set"
    assert loaded.origins["kv_cache.tiers.old.key.clip"].startswith("rotatekv.yaml:")
    assert loaded.variant == "4bit"


def test_override_reaches_lists_and_creates_missing_sections() -> None:
    loaded = load("w4", ["weights.0.codec.bits=3", "calibration.seed=3", "calibration.data=a.txt"])
    assert loaded.recipe.weights[0].codec.bits == 3
    assert loaded.recipe.calibration.seed == 3
    assert loaded.recipe.calibration.data == "a.txt"


def test_override_of_a_kind_drops_settings_of_the_old_one() -> None:
    loaded = load("w4", ["weights.0.solver.damp=0.1", "weights.0.solver.kind=rtn"])
    assert loaded.resolved["weights"][0]["solver"] == {"kind": "rtn"}


def test_rule_without_solver_rounds_to_nearest(tmp_path: Path) -> None:
    mine = write(tmp_path, "kvpack: 1\nname: c\nweights: [{match: '@q', codec: {kind: affine}}]\n")
    loaded = load(mine)
    assert kind_of(loaded.recipe.weights[0].solver) == "rtn"
    assert loaded.origins["weights.0.solver.kind"] == "default"


def test_resolved_recipe_loads_to_the_same_recipe(tmp_path: Path) -> None:
    import yaml

    for reference in ALL:
        first = load(reference)
        again = load(write(tmp_path, yaml.safe_dump(first.resolved)))
        assert again.recipe == first.recipe, reference
        assert again.sha256 == first.sha256, reference


def test_origins_cover_every_resolved_value() -> None:
    loaded = load("kivi")

    def walk(value: object, path: str) -> None:
        assert path in loaded.origins
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}")

    for key, value in loaded.resolved.items():
        walk(value, key)
    assert loaded.origins["kv_cache.policy.recent_tokens"] == "kivi.yaml:21"
    assert loaded.origins["calibration.samples"] == "default"


def test_all_errors_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    mine = write(
        tmp_path,
        """
        kvpack: 1
        name: 7
        weights:
          - {match: "@q", codec: {kind: afine}}
          - {match: "@k", codec: {kind: affine, bitz: 4}}
          - {match: "@v", codec: {kind: affine, bits: 9}}
          - {match: "@o", codec: {kind: affine, zero: flaot}}
          - {match: "@up", keep: "yes"}
          - {codec: {kind: rtn}}
        calibration: {samples: true}
        """,
    )
    found = messages(mine)
    expected = [
        "2:7: name: expected text, got 7",
        "4:33: weights.0.codec.kind: no codec is called 'afine'",
        "5:41: weights.1.codec.bitz: unknown key (did you mean 'bits'?)",
        "6:47: weights.2.codec.bits: 9 is out of range, allowed: 1 to 8",
        "(did you mean 'float'?)",
        "8:26: weights.4.keep: expected true or false, got 'yes'",
        "weights.5.codec.kind: no codec is called 'rtn'; there is a solver of that name",
        "weights.5.match: missing",
        "10:24: calibration.samples: expected a whole number, got True",
    ]
    for text in expected:
        assert any(text in message for message in found), (text, found)
    assert len(found) == len(expected)
    assert all(message.startswith(f"{mine}:") for message in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\n", "kvpack: missing"),
        ("kvpack: 2\nname: x\n", "version 2 is not supported"),
        ("kvpack: 1\n", "name: missing"),
        ("- a\n", "a recipe is a mapping"),
        ("kvpack: 1\nname: x\nweights: [{match: a}]\n", "neither a codec nor `keep: true`"),
        (
            "kvpack: 1\nname: x\nweights: [{match: a, keep: true, codec: {kind: affine}}]\n",
            "both `keep` and a codec",
        ),
        ("kvpack: 1\nname: x\nweights: [{match: a, codec: affine}]\n", "expected a mapping with a `kind`"),
        (
            "kvpack: 1\nname: x\nextends: kivi\nkv_cache: {policy: {inside: recnt}}\n",
            "(did you mean 'recent'?)",
        ),
        (
            "kvpack: 1\nname: x\nkv_cache: {tiers: {a: {codec: {kind: identity}, key: {kind: identity}}}}\n",
            "nothing may stand beside it",
        ),
        ("kvpack: 1\nname: x\nvariants: 3\nextends: kivi\n", "variants: expected a mapping"),
        ("kvpack: 1\nname: x\nextends: [3]\n", "extends: expected a recipe's name"),
    ],
)
def test_contradictions(tmp_path: Path, text: str, expected: str) -> None:
    reference = write(tmp_path, text)
    found = messages(f"{reference}@v" if "variants: 3" in text else reference)
    assert any(expected in message for message in found), found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("calibration.sampels=1", "--set: calibration.sampels: unknown key (did you mean 'samples'?)"),
        ("calibratoin.samples=1", "--set: calibratoin: unknown key (did you mean 'calibration'?)"),
        ("calibration.samples=0", "--set: calibration.samples: 0 is out of range, allowed: 1 or more"),
        ("weights.1.codec.bits=3", "--set: weights.1.codec.bits: '1' is not in the list"),
        ("weights.0.codec.bits.x=3", "there is nothing below 4"),
        ("weights.0.codec.bits", "is not key.path=value"),
        ("calibration.samples=[1", "not valid YAML"),
    ],
)
def test_wrong_overrides(override: str, expected: str) -> None:
    found = messages("w4", [override])
    assert any(expected in message for message in found), found


def test_unknown_names_are_answered_with_suggestions() -> None:
    assert "did you mean 'rotatekv'" in messages("rotatkv")[0]
    assert "did you mean '4bit'" in messages("kivi@4bits")[0]


def test_an_at_sign_in_a_path_is_not_a_variant(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL, "a@b.yaml")
    assert split_variant(path) == (path, None)
    assert load(path).recipe.name == "mine"
