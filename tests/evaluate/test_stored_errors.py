"""Errors per layer are those of what the cache stores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvpack.evaluate.stored_errors import StoredErrors
from tests.evaluate.conftest import IDENTITY, Packed, affine, kv_recipe
from tests.evaluate.test_laws import measured, random_pieces


def test_ratios_are_of_norms_over_everything_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [[torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2)] for _ in range(3)]
    noise = [[0.1 * torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2)] for _ in range(3)]
    errors, turn = StoredErrors(), iter(range(3))

    def update(key, value):
        i = next(turn)
        return key + noise[i][0], value + noise[i][1]

    cache = SimpleNamespace(layers=[SimpleNamespace(update=update)])
    errors.watch(cache)
    for key, value in given:
        cache.layers[0].update(key, value)
    (found,) = errors.layers()
    for plane, side in (("key", 0), ("value", 1)):
        exact = torch.stack([g[side] for g in given]).double()
        wrong = torch.stack([n[side] for n in noise]).double()
        assert getattr(found, plane) == pytest.approx((wrong.norm() / exact.norm()).item(), rel=1e-4)


def test_exact_caches_have_no_error_and_more_bits_have_less(packed: Packed, source: Path) -> None:
    pieces = random_pieces([64, 64])
    found = {
        bits: measured(packed(kv_recipe(codec, codec, 0)), None, pieces).layer_errors
        for bits, codec in {0: IDENTITY, 4: affine(4, "token"), 2: affine(2, "token")}.items()
    }
    assert [(e.layer, e.key, e.value) for e in found[0]] == [(0, 0, 0), (1, 0, 0)]
    for four, two in zip(found[4], found[2], strict=True):
        assert 0 < four.key < two.key / 2 < 0.5
        assert 0 < four.value < two.value / 2 < 0.5


def test_decoding_alone_measures_none(packed: Packed, source: Path) -> None:
    codec = affine(2, "token")
    found = measured(packed(kv_recipe(codec, codec, 0)), None, random_pieces([32]), protocols=("decode",))
    assert found.layer_errors == ()
    assert found.held.keys() == {"decode"}
