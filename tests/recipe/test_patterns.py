"""Which layers a pattern selects."""

from __future__ import annotations

import pytest

from kvpack.core.errors import RecipeError
from kvpack.core.model_spec import LinearSpec
from kvpack.recipe.patterns import closest, match

_ROLES = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
_MLP = ("gate", "up", "down")


def _linears(layers: int = 12) -> list[LinearSpec]:
    found = []
    for layer in range(layers):
        block = f"model.layers.{layer}"
        found += [LinearSpec(f"{block}.{m}.{r}_proj", r, (8, 8), layer, False) for r, m in _ROLES.items()]
        found += [LinearSpec(f"{block}.mlp.{r}_proj", r, (8, 8), layer, False) for r in _MLP]
    return [*found, LinearSpec("lm_head", "lm_head", (8, 8), None, False)]


LINEARS = _linears()


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*", 85),
        ("@linear", 84),
        ("@attention", 48),
        ("@mlp", 36),
        ("@q", 12),
        ("@lm_head", 1),
        ("lm_head", 1),
        ("layers.*.mlp.up_proj", 12),
        ("model.layers.*.mlp.up_proj", 12),
        ("up_proj", 12),
        ("proj", 0),
        ("layers.1.*.*", 7),
        ("layers.{1,11}.self_attn.{q,k}_proj", 4),
        ("layers.1.**", 7),
        ("model.**.down_proj", 12),
        ("model.**", 84),
        ("layers.*.up_proj", 0),
        ("layers.*.self_attn.*_proj", 48),
        ("re:model\\.layers\\.[0-9]\\.mlp\\.up_proj", 10),
        ("re:up_proj", 0),
        ("model.layersX*", 0),
        ("model.layers.1.mlp.up.proj", 0),
    ],
)
def test_match(pattern: str, count: int) -> None:
    found = match(pattern, LINEARS)
    assert len(found) == count
    assert found == [spec for spec in LINEARS if spec in found], "the order is kept"


def test_a_segment_star_stays_in_its_segment() -> None:
    assert [s.name for s in match("layers.1*.mlp.up_proj", LINEARS)] == [
        f"model.layers.{i}.mlp.up_proj" for i in (1, 10, 11)
    ]


@pytest.mark.parametrize("pattern", ["", "a.{b", "a.}b", "re:(", "@quary"])
def test_malformed(pattern: str) -> None:
    with pytest.raises(RecipeError):
        match(pattern, LINEARS)


def test_unknown_role_is_suggested() -> None:
    with pytest.raises(RecipeError, match="did you mean '@attention'"):
        match("@atention", LINEARS)


def test_closest_folds_layers_and_counts() -> None:
    assert closest("model.layers.*.mlp.gate", LINEARS)[0] == "model.layers.*.mlp.gate_proj (12)"
    assert closest("@qkv", LINEARS)[:2] == ["@down", "@gate"]
    assert closest("x", []) == []
