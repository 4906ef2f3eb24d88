"""Codecs of caches are refused for weights before any work."""

from __future__ import annotations

import pytest

from kvpack.core.errors import RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.binary import Binary
from kvpack.parts.codecs.low_rank import LowRank
from kvpack.parts.codecs.split_channels import SplitChannels
from kvpack.parts.solvers.rtn import Rtn
from kvpack.recipe.compat import check_weight_codec


@pytest.mark.parametrize("codec", [Affine(group=Group("token", 0)), LowRank(rank=4)], ids=repr)
def test_segments_cannot_pack_weights(codec: Affine | LowRank) -> None:
    with pytest.raises(RecipeError, match="cannot pack weights") as caught:
        check_weight_codec(codec, Rtn())
    assert caught.value.hint


def test_what_learns_from_tokens_cannot_pack_weights() -> None:
    with pytest.raises(RecipeError, match="cannot pack weights"):
        check_weight_codec(SplitChannels(Affine(), Binary(Group("channel", 32))), Rtn())


def test_others_can() -> None:
    for codec in (Affine(), Affine(group=Group("token", 8)), Binary(Group("channel", 32))):
        check_weight_codec(codec, Rtn())
