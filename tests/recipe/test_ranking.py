"""Schemes that cannot be ranked are refused before any work."""

from dataclasses import replace

import pytest

from kvpack.core.errors import RecipeError
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.transforms.merge_heads import MergeHeads
from kvpack.recipe.ranking import check_ranking
from tests.runtime.ranked import Ranked, mikv, separable, tokenwise, whole, zipcache
from tests.runtime.schemes import tiny


def test_sound_schemes_pass() -> None:
    model = tiny()
    for scheme in (zipcache(), mikv(), mikv(high=Identity())):
        for layer in scheme.plans(model):
            check_ranking(layer, "float16")


def test_planes_with_different_heads_are_refused() -> None:
    scheme = replace(zipcache(), key_transforms=(MergeHeads(),))
    with pytest.raises(RecipeError, match="1 and 2 heads"):
        check_ranking(scheme.plans(tiny())[0], "float16")


@pytest.mark.parametrize("codec", [whole(2), separable(2)])
def test_demoting_from_what_is_encoded_together_is_refused(codec: object) -> None:
    scheme = Ranked((tokenwise(8), codec), (tokenwise(8), tokenwise(2)), mikv().policy)
    with pytest.raises(RecipeError, match="cannot give up single tokens"):
        check_ranking(scheme.plans(tiny())[0], "float16")
