"""Every recipe that ships, with every variant: a new one is tested by being there."""

from __future__ import annotations

import pytest
import torch

from kvpack.core.errors import RecipeError
from kvpack.recipe.load import variants
from kvpack.recipe.locate import bundled
from tests.recipes.checks import check_everything, same_bits
from tests.recipes.conftest import Make

NAMES = [name for name in bundled() if not name.startswith("fragments/")]
RECIPES = [recipe for name in NAMES for recipe in (name, *(f"{name}@{v}" for v in variants(name)))]
REFUSED_BY_GEMMA3 = {
    "xquant-cl": "sliding window",
    "xquant-cl-rotated": "sliding window",
    "quarot": "cannot be turned",
    "qoq": "cannot be turned",
}


def test_recipes_are_found() -> None:
    assert {"kivi", "kivi@4bit", "rotatekv@2bit-reorder", "w4@rtn", "w8", "rotatekv-w4@3bit"} <= set(RECIPES)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_from_plan_to_generation(recipe: str, family: str, make: Make, prompt: torch.Tensor) -> None:
    check_everything(make(recipe, family), prompt)


@pytest.mark.parametrize("recipe", NAMES)
def test_recipe_on_alternating_windows_and_gemma_norms(recipe: str, make: Make, prompt: torch.Tensor) -> None:
    if recipe in REFUSED_BY_GEMMA3:
        with pytest.raises(RecipeError, match=REFUSED_BY_GEMMA3[recipe]):
            make(recipe, "gemma3_text")
    else:
        check_everything(make(recipe, "gemma3_text"), prompt)


@pytest.mark.parametrize("recipe", NAMES)
def test_two_loads_are_one_model(recipe: str, make: Make, prompt: torch.Tensor) -> None:
    made = make(recipe)
    with torch.inference_mode():
        first, second = (made.load()(prompt, use_cache=True).logits for _ in range(2))
    assert same_bits(first, second)
