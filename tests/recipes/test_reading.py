"""Every recipe with a cache: attention that reads codes equals attention over what they decode to."""

from __future__ import annotations

import pytest
import torch

from kvpack.recipe.load import load
from kvpack.runtime import layer as layers
from kvpack.runtime.install import new_cache
from tests.recipes.conftest import Make
from tests.recipes.test_bundled import RECIPES

CACHES = [recipe for recipe in RECIPES if load(recipe).recipe.kv_cache is not None]


@pytest.mark.parametrize("recipe", CACHES)
def test_codes_are_read_as_they_decode(
    recipe: str, make: Make, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(recipe)
    model, found = made.load(), []
    for most in (layers.MOST_QUERIES, 0):
        monkeypatch.setattr(layers, "MOST_QUERIES", most)
        cache = new_cache(model)
        with torch.inference_mode():
            outs = [model(prompt, past_key_values=cache).logits[:, -1:]]
            outs += [
                model(prompt[:, i : i + n], past_key_values=cache).logits for i, n in ((0, 1), (1, 1), (2, 3))
            ]
        found.append(torch.cat(outs, 1))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()
